"""A language model of the LLaMA family as the trunk of the story model, with its tokenizer.

Weights come from a GGUF file (the embedded SmolLM2) or from a folder in the Hugging Face layout (LLaMA 2). A GGUF
file is read tensor by tensor, so that only the layers that are wanted are dequantized.

Source: the paper, appendix A (the trunk is a pretrained LLaMA).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

_GGUF_LAYER_NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_GGUF_NAMES = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_CONTROL_TOKEN = 3
_ARCHITECTURE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
)  # fmt: skip


class LanguageModelError(ValueError):
    """A language model cannot be used; the message names the file and the remedy."""


def load_language_model(path: Path, layers: int | None = None, empty: bool = False) -> tuple[LlamaModel, Tokenizer]:
    """Load the first layers of a language model in float32, in evaluation mode, and its tokenizer.

    Args:
        path: A `.gguf` file, a folder with one, or a folder with config.json, safetensors and tokenizer.json.
        layers: How many layers to keep from the first on; None keeps all.
        empty: Leave the model's weights as they come, for one that is filled later.

    Raises:
        LanguageModelError: There is no model, it is not of the LLaMA family, or it has fewer layers.
    """
    if len(found := list(path.glob("*.gguf"))) == 1:
        path = found[0]
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path, layers, empty)
    if (path / "config.json").is_file():
        return _load_folder(path, layers, empty)
    raise LanguageModelError(f"no language model at {path}: expected a .gguf file or a folder with config.json")


def build_language_model(fields: dict[str, Any]) -> LlamaModel:
    """A float32 model of the given `LlamaConfig` fields with fresh weights, in evaluation mode."""
    return LlamaModel(LlamaConfig(**fields, attn_implementation="sdpa")).float().eval()


def describe_language_model(model: LlamaModel) -> dict[str, Any]:
    """The fields from which `build_language_model` builds the same architecture; plain JSON values."""
    fields = model.config.to_dict()
    return {name: fields[name] for name in _ARCHITECTURE}


def _load_folder(path: Path, layers: int | None, empty: bool) -> tuple[LlamaModel, Tokenizer]:
    config = LlamaConfig.from_pretrained(path, local_files_only=True)
    if config.model_type != "llama":
        raise LanguageModelError(f"{path} holds a {config.model_type!r} model: expected one of the LLaMA family")
    config.num_hidden_layers = _checked_layers(layers, config.num_hidden_layers, path)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if empty:
        model = LlamaModel(config).float()
    else:
        model = LlamaModel.from_pretrained(path, config=config, dtype=torch.float32, local_files_only=True)
    return model.eval(), tokenizer.backend_tokenizer


def _load_gguf(path: Path, layers: int | None, empty: bool) -> tuple[LlamaModel, Tokenizer]:
    from gguf import GGUFReader  # here, because it alone takes a second to import

    reader = GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    meta = {name: field.contents() for name, field in fields.items()}
    if meta.get("general.architecture") != "llama":
        raise LanguageModelError(f"{path} holds a {meta.get('general.architecture')!r} model: expected 'llama'")
    config = _gguf_config(meta)
    config["num_hidden_layers"] = _checked_layers(layers, config["num_hidden_layers"], path)
    model = build_language_model(config)
    if not empty:
        model.load_state_dict(dict(_gguf_weights(reader, model.config)))
    return model, _gguf_tokenizer(reader)


def _checked_layers(wanted: int | None, present: int, path: Path) -> int:
    if wanted is not None and not 1 <= wanted <= present:
        raise LanguageModelError(f"{wanted} layers wanted of {path}: expected 1 to {present}")
    return wanted or present


def _gguf_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
    }


def _gguf_weights(reader: Any, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """State dict entries of the layers that `config` keeps."""
    from gguf import dequantize

    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    for tensor in reader.tensors:
        name = _GGUF_NAMES.get(tensor.name)
        if tensor.name.startswith("blk."):
            _, layer, kind = tensor.name.split(".", 2)
            if int(layer) < config.num_hidden_layers:
                name = f"layers.{layer}.{_GGUF_LAYER_NAMES[kind]}"
        if name is not None:
            weight = dequantize(tensor.data, tensor.tensor_type)
            kind = tensor.name.split(".", 2)[-1]
            yield name, torch.from_numpy(_rotary_halves(weight, heads[kind]) if kind in heads else weight.copy())


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two numbers of a rotary pair side by side; transformers keeps them half a head apart."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _gguf_tokenizer(reader: Any) -> Tokenizer:
    """The byte-level tokenizer that the file describes.

    Source: `pre = smollm` of llama.cpp: digits one by one, then GPT-2's byte-level words.
    """
    kind = tuple(reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("model", "pre"))
    if kind != ("gpt2", "smollm"):
        raise LanguageModelError(f"tokenizer {kind} is not known: use a folder in the Hugging Face layout instead")
    words = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    control = [word for word, kind in zip(words, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    return tokenizer
