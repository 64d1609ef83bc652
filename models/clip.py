"""CLIP: pictures and texts as vectors of one space, whose cosine says how well they fit.

Dimensions: picture; text; dim = width of the space (768 for ViT-L/14).

Source: https://arxiv.org/abs/2103.00020, by transformers, from a folder in the Hugging Face layout. Pictures are scaled
so that the short side is the model's, and their middle is taken, as CLIP's own code does.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from models.pretrained import choose_device, load_pretrained

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 32


class Clip:
    """CLIP's two towers.

    Args:
        folder: With config.json, model.safetensors and the tokenizer.
        device: Where it runs; None takes an accelerator where there is one.

    Raises:
        WeightsError: The folder holds no such model.
    """

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self._device = choose_device(device)
        self._model, self._tokenizer = load_pretrained("CLIP", folder, self._device, CLIPModel, AutoTokenizer)
        self._side = int(self._model.config.vision_config.image_size)
        self._longest = int(self._model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[UInt8[ndarray, "height width 3"]]) -> Float32[ndarray, "picture dim"]:
        """Vectors of RGB pictures, each of length 1."""
        found = []
        for start in range(0, len(pictures), BATCH):
            values = np.stack([self._prepare(picture) for picture in pictures[start : start + BATCH]])
            pixels = torch.from_numpy(values).permute(0, 3, 1, 2).to(self._device)
            found.append(self._model.get_image_features(pixel_values=pixels).pooler_output)
        return torch.nn.functional.normalize(torch.cat(found), dim=-1).float().cpu().numpy()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float32[ndarray, "text dim"]:
        """Vectors of texts, each of length 1; what is longer than CLIP reads is cut off."""
        found = []
        for start in range(0, len(texts), BATCH):
            words = self._tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=self._longest,
                return_tensors="pt",
            ).to(self._device)  # fmt: skip
            found.append(self._model.get_text_features(**words).pooler_output)
        return torch.nn.functional.normalize(torch.cat(found), dim=-1).float().cpu().numpy()

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than CLIP reads."""
        words = self._tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
        return sum(len(ids) > self._longest for ids in words)

    def _prepare(self, picture: UInt8[ndarray, "height width 3"]) -> Float32[ndarray, "side side 3"]:
        height, width = picture.shape[:2]
        short = min(height, width)
        size = (self._side * width // short, self._side * height // short)  # cut, not rounded, as CLIP's own code does
        scaled = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        middle = scaled.crop((left, top, left + self._side, top + self._side))
        return (np.asarray(middle, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
