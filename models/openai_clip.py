"""CLIP under OpenAI's names, as FaRL and LongCLIP publish it, to the names and sizes that transformers takes."""

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPTextConfig, CLIPVisionConfig

HEAD_WIDTH = 64
"""Of CLIP's attention heads."""

_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_VISION_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_TEXT_NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)(weight|bias)")


def rename_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names of a CLIP vision tower, under `visual.`, to those of `CLIPVisionModelWithProjection`.

    Raises:
        KeyError: There is no such tower, or a name in it is not known.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        if not name.startswith("visual."):
            continue
        name, value = name.removeprefix("visual."), value.float()
        if name == "proj":
            found["visual_projection.weight"] = value.T.contiguous()
        elif layer := _LAYER.fullmatch(name):
            found |= _rename_layer("vision_model", layer, value)
        else:
            found[f"vision_model.{_VISION_NAMES[name]}"] = value
    if not found:
        raise KeyError("visual.conv1.weight")
    return found


def rename_text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names of a CLIP text tower to those of `CLIPTextModelWithProjection`; the rest is left out.

    Raises:
        KeyError: There is no such tower.
    """
    found = {f"text_model.{ours}": state[theirs].float() for theirs, ours in _TEXT_NAMES.items()}
    found["text_projection.weight"] = state["text_projection"].float().T.contiguous()
    for name, value in state.items():
        if layer := _LAYER.fullmatch(name):
            found |= _rename_layer("text_model", layer, value.float())
    return found


def _rename_layer(tower: str, layer: re.Match[str], value: Tensor) -> dict[str, Tensor]:
    prefix, name, kind = f"{tower}.encoder.layers.{layer[1]}", layer[2].rstrip("._"), layer[3]
    if name == "attn.in_proj":
        parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{part}.{kind}": chunk.contiguous() for part, chunk in parts}
    return {f"{prefix}.{_LAYER_NAMES[name]}.{kind}": value}


def describe_vision(state: Mapping[str, Tensor]) -> CLIPVisionConfig:
    """The sizes of a renamed vision tower."""
    width, _, patch_px, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    patches = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=_count_layers(state, "vision_model"),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=patch_px * round(patches**0.5),
        patch_size=patch_px,
        projection_dim=len(state["visual_projection.weight"]),
        hidden_act="quick_gelu",
    )


def describe_text(state: Mapping[str, Tensor]) -> CLIPTextConfig:
    """The sizes of a renamed text tower."""
    words, width = state["text_model.embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=len(state["text_model.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=_count_layers(state, "text_model"),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=len(state["text_model.embeddings.position_embedding.weight"]),
        projection_dim=len(state["text_projection.weight"]),
        hidden_act="quick_gelu",
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=0,
    )


def _count_layers(state: Mapping[str, Tensor], tower: str) -> int:
    return 1 + max(int(name.split(".")[3]) for name in state if name.startswith(f"{tower}.encoder.layers."))
