"""Tiny models with random weights, saved in the layout in which their makers publish them."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<start>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}PICTURE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<end>\n{% endfor %}<start>assistant\n"
)


def make_tokenizer(picture: str = "<picture>") -> PreTrainedTokenizerFast:
    """One token a byte, and a few special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<end>", "<pad>", "<start>", "<picture>", "<film>", "<see>", "</see>"]
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in specials])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    made.chat_template = CHAT.replace("PICTURE", picture)
    return made


def save_qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL."""
    tokenizer = make_tokenizer("<see><picture></see>")
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": rope,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 14,
            "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [1],
        },
        image_token_id=ids("<picture>"), video_token_id=ids("<film>"), vision_start_token_id=ids("<see>"),
        vision_end_token_id=ids("</see>"),
    )  # fmt: skip
    pictures = transformers.Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    )
    return _save(folder, transformers.Qwen3VLForConditionalGeneration, config, tokenizer, pictures)


def save_deepseek_vl(folder: Path) -> Path:
    """DeepSeek-VL, which sees every picture as as many tokens."""
    tokenizer = make_tokenizer()
    config = transformers.DeepseekVLConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<picture>"),
    )  # fmt: skip
    pictures = transformers.DeepseekVLImageProcessorPil(size={"height": 28, "width": 28}, min_size=4)
    _save(folder, transformers.DeepseekVLForConditionalGeneration, config, tokenizer, pictures)
    (folder / "processor_config.json").write_text(json.dumps({"num_image_tokens": 4}))
    return folder


def save_llama(folder: Path) -> Path:
    """A language model that sees nothing."""
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return _save(folder, transformers.LlamaForCausalLM, config, tokenizer)


def _save(folder: Path, family: type, config: object, tokenizer: PreTrainedTokenizerFast, *parts: object) -> Path:
    torch.manual_seed(0)
    model = family(config).eval()
    for name, weight in model.named_parameters():  # at the usual small scale all prompts get the same answer
        if weight.dim() > 1 and "norm" not in name:
            torch.nn.init.normal_(weight, std=0.5)
    # Ends at many letters, so that answers are short.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(0, 256, 16)]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    for part in (tokenizer, *parts):
        part.save_pretrained(folder)
    return folder
