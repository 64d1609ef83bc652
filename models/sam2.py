"""Masks of what lies in boxes, by SAM 2.

Source: Grounded SAM, which the paper names for segmenting characters (appendix B); its newer SAM 2, by transformers.
The picture is prepared here, because the ready-made processor asks for torchvision: scaled to a square, ImageNet's mean
and deviation.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from PIL import Image
from torch.nn import functional
from transformers import Sam2Model

from models.pretrained import choose_device, load_pretrained
from models.regions import round_out

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Sam2:
    """SAM 2 for still pictures.

    Args:
        folder: In the Hugging Face layout.
        device: Where it runs; None takes an accelerator where there is one.

    Raises:
        WeightsError: The folder holds no such model.
    """

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self._device = choose_device(device)
        (self._model,) = load_pretrained("SAM 2", folder, self._device, Sam2Model)
        self._side = int(self._model.config.prompt_encoder_config.image_size)

    @torch.inference_mode()
    def segment(
        self, image: UInt8[ndarray, "height width 3"], boxes: Float32[ndarray, "box 4"]
    ) -> list[UInt8[ndarray, "rows columns"]]:
        """How surely each pixel of each box, rounded out to whole pixels, belongs to what it holds: 0..255.

        `image` is RGB; boxes are x0, y0, x1, y1 in its pixels and must lie in it. The picture is read once for all.
        """
        height, width = image.shape[:2]
        scaled = Image.fromarray(image).resize((self._side, self._side), Image.Resampling.BILINEAR)
        pixels = (np.asarray(scaled, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        prompts = boxes * (np.float32([self._side] * 4) / (width, height, width, height)).astype(np.float32)
        found = self._model(
            pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self._device),
            input_boxes=torch.from_numpy(prompts)[None].to(self._device),
            multimask_output=False,
        )
        logits = functional.interpolate(found.pred_masks[0].float(), (height, width), mode="bilinear")[:, 0]
        sure = (logits.sigmoid() * 255).round().byte().cpu().numpy()
        masks = []
        for mask, box in zip(sure, boxes, strict=True):
            x0, y0, x1, y1 = round_out(box, width, height)
            masks.append(mask[y0:y1, x0:x1])
        return masks
