"""Persons, or whatever a few words name, by Grounding DINO.

Source: the paper, appendix B (prompt "person"). Boxes that overlap almost wholly are one, as in Grounded SAM. The model
is run by transformers; `models.grounding_dino_original` runs it by its authors' own code.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil

from models.person_detector import Persons
from models.pretrained import choose_device, load_pretrained
from models.regions import suppress

SUPPRESSION_IOU = 0.8


class GroundingDino:
    """Grounding DINO by transformers.

    Args:
        folder: With config.json, model.safetensors, tokenizer and preprocessor_config.json.
        prompt: What is looked for.
        device: Where it runs; None takes an accelerator where there is one.

    Raises:
        WeightsError: The folder holds no such model.
    """

    def __init__(self, folder: Path, prompt: str, device: str | None = None) -> None:
        self._device = choose_device(device)
        self._model, self._pictures, tokenizer = load_pretrained(
            "Grounding DINO", folder, self._device, GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil,
            AutoTokenizer,
        )  # fmt: skip
        self._words = tokenizer(normalise_prompt(prompt), return_tensors="pt").to(self._device)

    @torch.inference_mode()
    def detect(self, image: UInt8[ndarray, "height width 3"], min_score: float) -> Persons:
        """What the prompt names in one RGB picture, with a score of at least `min_score` (0..1)."""
        seen = self._pictures(images=Image.fromarray(image), return_tensors="pt").to(self._device)
        found = self._model(**seen, **self._words)
        return read_boxes(found.pred_boxes[0], found.logits[0].sigmoid().amax(-1), image.shape[:2], min_score)


def normalise_prompt(prompt: str) -> str:
    """Lower case and a full stop at the end, as the model was trained."""
    return f"{prompt.strip().rstrip('.').lower()}."


def read_boxes(boxes: Tensor, scores: Tensor, shape: tuple[int, int], min_score: float) -> Persons:
    """Boxes (query, 4) of middle, width and height as parts of the picture, to pixels, best first, each thing once."""
    height, width = shape
    middle, size = boxes.float().cpu().numpy()[:, :2], boxes.float().cpu().numpy()[:, 2:]
    corners = np.concatenate([middle - size / 2, middle + size / 2], axis=1) * (width, height, width, height)
    corners: Float32[ndarray, "query 4"] = np.clip(corners, 0, (width, height, width, height)).astype(np.float32)
    values = scores.float().cpu().numpy()
    kept = np.flatnonzero((values >= min_score) & ((corners[:, 2:] - corners[:, :2]) > 1).all(axis=1))
    kept = kept[suppress(corners[kept], values[kept], SUPPRESSION_IOU)]
    return Persons(corners[kept], values[kept])
