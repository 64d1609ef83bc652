"""The frozen image encoder: DINOv2 ViT-S/14, read from the packaged ONNX file.

Dimensions: batch; height, width in pixels; patch = (height / 14) * (width / 14), row by row; dim = 384.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from jaxtyping import Float
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from models import weights

PATCH_PX = 14
LAYERS = 8  # the layers after the eighth were tuned for saliency by the package that carries the weights
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


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
        height, width = images.shape[-2:]
        if height % PATCH_PX or width % PATCH_PX:
            raise ValueError(f"picture is {width}x{height}: both sides must be multiples of {PATCH_PX}; resize it")
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
