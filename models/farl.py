"""Face embeddings that condition the models: FaRL.

Source: the paper, appendix A ("The character ID embedding is extracted with FARL"). FaRL is CLIP's ViT-B/16 trained on
faces (https://arxiv.org/abs/2112.03109); its file holds OpenAI's names, which are mapped to those of transformers.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from models.weights import WeightsError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's."""
HEAD_WIDTH = 64
"""Of CLIP's attention heads."""

_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}


class Farl:
    """FaRL's picture side.

    Args:
        path: The upstream `.pth` file, or what `weights convert` made of it.
        device: Where it runs; None takes an accelerator where there is one.

    Attributes:
        width: Numbers in an embedding (512 for ViT-B/16).

    Raises:
        WeightsError: The file is not FaRL's.
    """

    def __init__(self, path: Path, device: str | None = None) -> None:
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_farl(path).to(self._device)
        self._side = int(self._model.config.image_size)
        self.width = int(self._model.config.projection_dim)

    @torch.inference_mode()
    def embed(self, chips: list[UInt8[ndarray, "side side 3"]]) -> Float32[ndarray, "face dim"]:
        """Embeddings of aligned RGB faces, each of length 1."""
        if not chips:
            return np.zeros((0, self.width), np.float32)
        size = (self._side, self._side)
        pixels = np.stack([cv2.resize(chip, size, interpolation=cv2.INTER_CUBIC) for chip in chips])
        values = (pixels.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        found = self._model(pixel_values=torch.from_numpy(values).permute(0, 3, 1, 2).to(self._device))
        return torch.nn.functional.normalize(found.image_embeds, dim=-1).cpu().numpy()


def load_farl(path: Path) -> CLIPVisionModelWithProjection:
    """FaRL's vision tower in evaluation mode.

    Raises:
        WeightsError: The file is not FaRL's.
    """
    try:
        if path.suffix == ".safetensors":
            state: Mapping[str, Tensor] = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            state = loaded.get("state_dict", loaded)
        renamed = rename_openai_vision(state)
        model = CLIPVisionModelWithProjection(describe_vision(renamed))
        model.load_state_dict(renamed)
    except (OSError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} is not a FaRL file: {error!r}") from error
    return model.eval()


def rename_openai_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        elif layer := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)", name):
            found |= _rename_layer(int(layer[1]), layer[2].rstrip("._"), layer[3], value)
        else:
            found[f"vision_model.{_NAMES[name]}"] = value
    if not found:
        raise KeyError("visual.conv1.weight")
    return found


def _rename_layer(index: int, name: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    prefix = f"vision_model.encoder.layers.{index}"
    if name == "attn.in_proj":
        parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{part}.{kind}": chunk.contiguous() for part, chunk in parts}
    return {f"{prefix}.{_LAYER_NAMES[name]}.{kind}": value}


def describe_vision(state: Mapping[str, Tensor]) -> CLIPVisionConfig:
    """The sizes of a renamed vision tower."""
    width, _, patch_px, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    patches = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
    layers = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("vision_model.encoder.layers."))
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=patch_px * round(patches**0.5),
        patch_size=patch_px,
        projection_dim=len(state["visual_projection.weight"]),
        hidden_act="quick_gelu",
    )
