"""Tiny models with random weights, saved in the layout in which their makers publish them."""

import json
from pathlib import Path

import diffusers
import numpy as np
import onnx
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from models.inception import InceptionV3

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


def save_deepseek_vl_hybrid(folder: Path) -> Path:
    """DeepSeek-VL as its 7B is built: beside SigLIP, SAM's encoder looks at a larger picture."""
    tokenizer = make_tokenizer()
    config = transformers.DeepseekVLHybridConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
        high_res_vision_config={
            "model_type": "sam_vision_model", "hidden_size": 32, "output_channels": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "window_size": 2,
            "global_attn_indexes": [0, 1], "mlp_dim": 64,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<picture>"),
    )  # fmt: skip
    pictures = transformers.DeepseekVLHybridImageProcessorPil(
        size={"height": 28, "width": 28}, high_res_size={"height": 64, "width": 64}, min_size=4
    )
    _save(folder, transformers.DeepseekVLHybridForConditionalGeneration, config, tokenizer, pictures)
    (folder / "processor_config.json").write_text(json.dumps({"num_image_tokens": 4}))
    return folder


def save_llama(folder: Path, ends_at_letters: bool = True) -> Path:
    """A language model that sees nothing. One that ends at many letters answers briefly."""
    tokenizer = make_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    _save(folder, transformers.LlamaForCausalLM, config, tokenizer)
    if not ends_at_letters:
        ends = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        ends.save_pretrained(folder)
    return folder


def _save(folder: Path, family: type, config: object, tokenizer: PreTrainedTokenizerFast, *parts: object) -> Path:
    torch.manual_seed(0)
    model = family(config).eval()
    for name, weight in model.named_parameters():  # at the usual small scale all prompts get the same answer
        if weight.dim() > 1 and "norm" not in name:
            torch.nn.init.normal_(weight, std=0.5)
    if model.can_generate():  # ends at many letters, so that answers are short
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(0, 256, 16)]
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    for part in (tokenizer, *parts):
        part.save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """CLIP, with one token a byte."""
    tokenizer = make_tokenizer()
    towers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config=towers | words, vision_config=towers | {"image_size": 28, "patch_size": 14}, projection_dim=16
    )
    return _save(folder, transformers.CLIPModel, config, tokenizer)


def save_sdxl(folder: Path, variant: str | None = "fp16") -> Path:
    """SDXL's UNet, VAE and scheduler in its makers' layout; the UNet's file is the half-precision one."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24, attention_head_dim=(2, 4), norm_num_groups=8, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, scaling_factor=0.13025,
    )  # fmt: skip
    unet.half().save_pretrained(folder / "unet", variant=variant)
    vae.save_pretrained(folder / "vae")
    diffusers.EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    return folder


def save_grounding_dino(folder: Path) -> Path:
    """Grounding DINO with a tiny Swin and a tiny BERT."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "person", "a", "dog"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64,
            out_indices=[2, 3, 4],
        ),
        text_config=transformers.BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64,
        ),
        num_queries=20, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, d_model=256, encoder_n_points=2, decoder_n_points=2,
    )  # fmt: skip
    pictures = transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    torch.manual_seed(0)
    model = transformers.GroundingDinoForObjectDetection(config).eval()
    for part in (model, tokenizer, pictures):
        part.save_pretrained(folder)
    return folder


def save_sam2(folder: Path) -> Path:
    """SAM 2 with a tiny Hiera."""
    torch.manual_seed(0)
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=16, num_attention_heads=1, blocks_per_stage=[1, 1, 1, 1], image_size=[64, 64],
        embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4, 4, 4, 4], global_attention_blocks=[],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    config = transformers.Sam2Config(
        vision_config=transformers.Sam2VisionConfig(
            backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16], fpn_hidden_size=32,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        ),
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 1,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    transformers.Sam2Model(config).eval().save_pretrained(folder)
    return folder


def save_insightface(folder: Path) -> Path:
    """A folder as `buffalo_l`: SCRFD's nine outputs at three strides, and ArcFace's one of 512 numbers.

    The detector finds a face wherever eight by eight pixels are brighter than half, two strides wide around them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_scrfd(folder / "det_tiny.onnx")
    _save_arcface(folder / "w600k_tiny.onnx")
    return folder


def _save_scrfd(path: Path) -> None:
    nodes, weights, outputs = [], [], []
    widths = {"score": 1, "bbox": 4, "kps": 10}
    for kind, width in widths.items():
        for stride in (8, 16, 32):
            name = f"{kind}_{stride}"
            kernel = np.zeros((2 * width, 3, stride, stride), np.float32)
            bias = np.zeros(2 * width, np.float32)
            if kind == "score" and stride == 8:
                kernel[0] = 12.0 / (3 * stride * stride)  # the input is in -1..1: pixels of half brightness give 0
            elif kind == "score":
                bias[:] = -20.0
            elif kind == "bbox":
                bias[:] = 2.0
            else:
                bias[:] = np.tile([-1, -1, 1, -1, 0, 0, -1, 1, 1, 1], 2)
            if kind == "score":
                bias[1::2] = -20.0
            weights += [numpy_helper.from_array(kernel, f"{name}_w"), numpy_helper.from_array(bias, f"{name}_b")]
            shape = numpy_helper.from_array(np.array([-1, width], np.int64), f"{name}_s")
            weights.append(shape)
            nodes += [
                helper.make_node("Conv", ["input", f"{name}_w", f"{name}_b"], [f"{name}_c"], strides=[stride, stride]),
                helper.make_node("Transpose", [f"{name}_c"], [f"{name}_t"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"{name}_t", f"{name}_s"], [f"{name}_r"]),
                helper.make_node("Sigmoid" if kind == "score" else "Identity", [f"{name}_r"], [name]),
            ]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width]))
    _save_graph(path, nodes, weights, [1, 3, None, None], outputs)


def _save_arcface(path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((16, 3, 28, 28)).astype(np.float32) / 48, "w"),
        numpy_helper.from_array(rng.standard_normal((256, 512)).astype(np.float32) / 16, "p"),
    ]
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["c"], strides=[28, 28]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("MatMul", ["f", "p"], ["embedding"]),
    ]
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [None, 512])
    _save_graph(path, nodes, weights, [None, 3, 112, 112], [output])


def _save_graph(path: Path, nodes: list, weights: list, shape: list[int | None], outputs: list) -> None:
    graph_input = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "tiny", [graph_input], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


class OpenAIVision(torch.nn.Module):
    """A CLIP vision tower under the names of OpenAI's checkpoints, as FaRL's file has them."""

    def __init__(self, width: int = 64, layers: int = 2, patch_px: int = 16, side_px: int = 32, out: int = 24) -> None:
        super().__init__()
        tokens = (side_px // patch_px) ** 2 + 1
        self.conv1 = torch.nn.Conv2d(3, width, patch_px, patch_px, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(width))
        self.positional_embedding = torch.nn.Parameter(torch.randn(tokens, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList([_OpenAIBlock(width) for _ in range(layers)])
        self.proj = torch.nn.Parameter(torch.randn(width, out))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        hidden = self.ln_pre(torch.cat([first, hidden], 1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            hidden = block(hidden)
        return self.ln_post(hidden[:, 0]) @ self.proj


class _OpenAIBlock(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.mlp = torch.nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        seen = self.ln_1(hidden)
        hidden = hidden + self.attn(seen, seen, seen, need_weights=False, attn_mask=mask)[0]
        inner = self.mlp.c_fc(self.ln_2(hidden))
        return hidden + self.mlp.c_proj(inner * torch.sigmoid(1.702 * inner))


class OpenAIText(torch.nn.Module):
    """LongCLIP's text tower under the names of its checkpoint, with both of its tables of positions."""

    def __init__(self, words: int, width: int = 64, layers: int = 2, positions: int = 248, out: int = 24) -> None:
        super().__init__()
        self.token_embedding = torch.nn.Embedding(words, width)
        self.positional_embedding = torch.nn.Parameter(torch.randn(positions, width))
        self.positional_embedding_res = torch.nn.Parameter(torch.randn(positions, width))
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList([_OpenAIBlock(width) for _ in range(layers)])
        self.ln_final = torch.nn.LayerNorm(width)
        self.text_projection = torch.nn.Parameter(torch.randn(width, out))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        first = (torch.arange(len(self.positional_embedding)) < 20).unsqueeze(-1)
        positions = torch.where(first, self.positional_embedding, self.positional_embedding_res)
        hidden = self.token_embedding(words) + positions[: words.shape[1]]
        mask = torch.full((words.shape[1],) * 2, -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            hidden = block(hidden, mask)
        ends = words.argmax(1)
        return self.ln_final(hidden)[torch.arange(len(words)), ends] @ self.text_projection


def save_longclip(folder: Path) -> OpenAIText:
    """LongCLIP's file beside CLIP's tokenizer; returns the text tower."""
    letters = [chr(97 + i) for i in range(26)]
    vocabulary = {word: index for index, word in enumerate(["!", *letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, vocabulary[word]) for word in ("<|startoftext|>", "<|endoftext|>")]
    tokenizer.post_processor = TemplateProcessing(single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    tower = OpenAIText(len(vocabulary)).eval()
    state = tower.state_dict() | {"visual.proj": torch.zeros(2, 2), "logit_scale": torch.tensor(1.0)}
    torch.save(state, folder / "longclip-L.pt")
    return tower


def save_farl(path: Path) -> OpenAIVision:
    """FaRL's file, which also holds the text side and the training's own weights; returns the vision tower."""
    torch.manual_seed(0)
    tower = OpenAIVision().eval()
    state = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    state |= {"token_embedding.weight": torch.zeros(4, 4), "logit_scale": torch.tensor(1.0)}
    torch.save({"state_dict": state}, path)
    return tower


def save_svd(folder: Path, variant: str | None = "fp16") -> Path:
    """Stable Video Diffusion; with `variant`, the files of weights bear its name, as those that upstream halves do."""
    torch.manual_seed(0)
    parts = {
        "unet": diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64), num_attention_heads=(2, 4), layers_per_block=1, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, sample_size=8, num_frames=25,
        ),
        "vae": diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
            sample_size=64,
        ),
        "image_encoder": transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=224,
                patch_size=56, projection_dim=16,
            )
        ),
    }  # fmt: skip
    for name, part in parts.items():
        part.eval()
        (part.half() if variant else part).save_pretrained(folder / name, variant=variant)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        steps_offset=1, timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
        sigma_min=0.002, sigma_max=700.0,
    )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    transformers.CLIPImageProcessorPil().save_pretrained(folder / "feature_extractor")
    index = {
        "_class_name": "StableVideoDiffusionPipeline",
        "_diffusers_version": "0.24.0.dev0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
        "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def save_inception(path: Path) -> None:
    """FID's Inception-v3: of one size only, so at its own, with weights that keep activations in bounds."""
    drawn = torch.Generator().manual_seed(7)
    state = InceptionV3().state_dict()
    for name in sorted(state):
        shape = state[name].shape
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=drawn) + 0.5
        elif len(shape) > 1:
            state[name] = torch.randn(shape, generator=drawn) * (2 / state[name][0].numel()) ** 0.5
        elif not name.endswith("num_batches_tracked"):
            state[name] = torch.randn(shape, generator=drawn) * 0.1
    torch.save(state, path)


def save_aesthetic(path: Path, width: int = 16) -> dict[str, torch.Tensor]:
    """The aesthetic predictor, for narrower embeddings; returns what is in the file."""
    drawn = torch.Generator().manual_seed(3)
    sizes = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    state = {}
    for number, (inward, outward) in sizes.items():
        state[f"layers.{number}.weight"] = torch.randn(outward, inward, generator=drawn) / inward**0.5
        state[f"layers.{number}.bias"] = torch.randn(outward, generator=drawn)
    torch.save(state, path)
    return state
