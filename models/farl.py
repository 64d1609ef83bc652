"""Face embeddings that condition the models: FaRL.

Source: the paper, appendix A ("The character ID embedding is extracted with FARL"). FaRL is CLIP's ViT-B/16 trained on
faces (https://arxiv.org/abs/2112.03109); its file holds OpenAI's names.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from models.openai_clip import describe_vision, rename_vision
from models.pretrained import choose_device
from models.weights import WeightsError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's."""


class Farl:
    """FaRL's picture side.

    Args:
        path: The upstream `.pth` file, or what `weights pull` made of it.
        device: Where it runs; None takes an accelerator where there is one.

    Attributes:
        width: Numbers in an embedding (512 for ViT-B/16).

    Raises:
        WeightsError: The file is not FaRL's.
    """

    def __init__(self, path: Path, device: str | None = None) -> None:
        self._device = choose_device(device)
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
        renamed = rename_vision(state)
        model = CLIPVisionModelWithProjection(describe_vision(renamed))
        model.load_state_dict(renamed)
    except (OSError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} is not a FaRL file: {error!r}") from error
    return model.eval()
