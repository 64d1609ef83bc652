"""The frozen image encoder: CLIP ViT-L/14 as in the paper, or DINOv2 ViT-S/14 out of a packaged ONNX file.

Dimensions: batch; height, width in pixels; patch = (height / side of a patch) * (width / side), row by row;
dim = 1024 for CLIP ViT-L/14, 384 for DINOv2-S.
"""

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import torch
from jaxtyping import Float
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import CLIPVisionModel, Dinov2Config, Dinov2Model

from models import clip, weights
from models.pretrained import load_pretrained

DINOV2 = "dinov2_small"
PATCH_PX = 14
LAYERS = 8  # the layers after the eighth were tuned for saliency by the package that carries the weights
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class ImageEncoder(Protocol):
    """What both encoders have: width and side in pixels of a patch, a name for people, and `encode`."""

    dim: int
    patch_px: int
    described: str

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patch dim"]: ...


def open_image_encoder(name: str, weights_dir: Path | None = None, device: str = "cpu") -> ImageEncoder:
    """The frozen encoder that a setting names.

    Args:
        name: `dinov2_small`, or CLIP's: a name of the table of weights or a folder.
        weights_dir: Folder of pulled weights; None for the default one.
        device: Where it runs.

    Raises:
        weights.WeightsError: There are no such weights.
    """
    if name == DINOV2:
        return DinoV2(weights_dir).to(device)
    return ClipPatches(weights.locate(name, weights_dir), device)


class ClipPatches(nn.Module):
    """Image to patch tokens: CLIP's hidden states before its last layer, without the class token. Frozen.

    Source: appendix A ("spatial tokens" of CLIP's image encoder). The last layer but one is what LLaVA takes, whose
    design the paper follows elsewhere; the last one is trained for the class token alone.

    Args:
        folder: CLIP in the Hugging Face layout.
        device: Where it runs.

    Raises:
        weights.WeightsError: The folder holds no CLIP.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        super().__init__()
        (self.backbone,) = load_pretrained("CLIP image encoder", folder, device, CLIPVisionModel)
        self.dim = int(self.backbone.config.hidden_size)
        self.patch_px = int(self.backbone.config.patch_size)
        self.described = f"CLIP ViT with {self.backbone.config.num_hidden_layers} layers, patches of {self.patch_px} px"
        self.register_buffer("mean", torch.tensor(clip.MEAN, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(clip.STD, device=device).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patch dim"]:
        """Encode RGB pictures in 0..1 whose height and width are multiples of the patch.

        The position table is interpolated where the picture is not of the size that CLIP was trained at.

        Raises:
            ValueError: A side is not a multiple of the patch.
        """
        _check_sides(images, self.patch_px)
        own = self.backbone.config.image_size
        output = self.backbone(
            pixel_values=(images.to(self.mean) - self.mean) / self.std,
            output_hidden_states=True,
            interpolate_pos_encoding=tuple(images.shape[-2:]) != (own, own),
        )
        return output.hidden_states[-2][:, 1:]

    def train(self, mode: bool = True) -> "ClipPatches":
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)


def count_patches(height_px: int, width_px: int, patch_px: int) -> int:
    """Patches of a picture."""
    return math.prod(side // patch_px for side in (height_px, width_px))


def _check_sides(images: Tensor, patch_px: int) -> None:
    height, width = images.shape[-2:]
    if height % patch_px or width % patch_px:
        raise ValueError(f"picture is {width}x{height}: both sides must be multiples of {patch_px}; resize it")


class DinoV2(nn.Module):
    """Image to patch tokens: the hidden states after the eighth of DINOv2-S's twelve layers. Frozen.

    Source: section 4.1 of the paper uses a frozen CLIP encoder in this place; no package carries one, so this
    profile takes DINOv2 (https://arxiv.org/abs/2304.07193).

    Args:
        weights_dir: Folder of pulled weights; None for the default one.

    Raises:
        weights.WeightsError: The weights were not pulled.
    """

    dim = 384
    patch_px = PATCH_PX
    described = "DINOv2-S, hidden states after layer 8"

    def __init__(self, weights_dir: Path | None = None):
        super().__init__()
        self.backbone = load_dinov2(weights.file("dinov2_small", weights_dir), LAYERS)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patch dim"]:
        """Encode RGB pictures in 0..1 whose height and width are multiples of 14 into patch tokens of width 384.

        The position table is interpolated to the picture's size.

        Raises:
            ValueError: A side is not a multiple of 14.
        """
        _check_sides(images, PATCH_PX)
        tokens = self.backbone.embeddings((images - self.mean) / self.std)
        for layer in self.backbone.encoder.layer:
            tokens = layer(tokens)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return tokens[:, 1:]

    def train(self, mode: bool = True) -> "DinoV2":
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)


def load_dinov2(path: Path, layers: int) -> Dinov2Model:
    """The first `layers` (at most 12) of the DINOv2-S backbone in an ONNX export, as a transformers model."""
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=6, image_size=518, patch_size=PATCH_PX
    )
    model = Dinov2Model(config)
    state = _read_state(path, layers)
    state["embeddings.mask_token"] = torch.zeros_like(model.embeddings.mask_token)  # unused without masking
    model.load_state_dict(state, strict=True)
    return model.eval()


def _read_state(path: Path, layers: int) -> dict[str, Tensor]:
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:  # the exporter renamed and transposed the weights of linear layers
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = arrays[node.input[1]].T
    class_position, patch_positions = _position_tables(graph, arrays)
    state["embeddings.position_embeddings"] = np.concatenate([class_position, patch_positions], axis=1)
    renamed = {_rename(name): torch.from_numpy(np.array(a)) for name, a in state.items()}
    return {name: tensor for name, tensor in renamed.items() if _layer_of(name) < layers}


def _position_tables(graph: onnx.GraphProto, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    patch = [a for name, a in arrays.items() if a.ndim == 3 and a.shape[1] == 37 * 37]
    first = [a for name, a in arrays.items() if name.startswith("onnx::Concat") and a.shape == (1, 1, 384)]
    return first[0], patch[0]


def _rename(name: str) -> str:
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f"attention.attention.{old}", f"attention.{new}")
    return name.replace("attention.output.dense", "attention.o_proj")


def _layer_of(name: str) -> int:
    return int(name.split(".")[2]) if name.startswith("encoder.layer.") else -1
