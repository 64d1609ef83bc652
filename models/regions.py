"""Regions of a picture: boxes, their overlaps, and the soft mask of a person inside a box.

A box is x0, y0, x1, y1 with x1 and y1 exclusive. Masks come from MediaPipe's selfie segmentation, run by OpenCV on one
person's crop at a time: the network was made for one person who fills the picture.

Dimensions: a, b, box: boxes; height, width: pixels of the picture; rows, columns: pixels of a box, rounded out.
"""

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from numpy import ndarray

from models import weights

_SIDE_PX = 256
_MARGIN = 0.1
"""Added on each side of the box, as a part of its width and height."""


def intersections(first: Float[ndarray, "a 4"], second: Float[ndarray, "b 4"]) -> Float[ndarray, "a b"]:
    """Area that each box of `first` shares with each of `second`."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    opposite = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.clip(opposite - corner, 0, None).prod(axis=-1)


def areas(boxes: Float[ndarray, "box 4"]) -> Float[ndarray, " box"]:
    """Area of each box; 0 for a box that is inside out."""
    return np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=-1)


def overlaps(first: Float[ndarray, "a 4"], second: Float[ndarray, "b 4"]) -> Float[ndarray, "a b"]:
    """Intersection over union of each pair, 0..1."""
    shared = intersections(first, second)
    union = areas(first)[:, None] + areas(second)[None] - shared
    return shared / np.maximum(union, 1e-12)


def contained(inner: Float[ndarray, "a 4"], outer: Float[ndarray, "b 4"]) -> Float[ndarray, "a b"]:
    """The part of each box of `inner` that lies in each of `outer`, 0..1."""
    return intersections(inner, outer) / np.maximum(areas(inner), 1e-12)[:, None]


def suppress(boxes: Float[ndarray, "box 4"], scores: Float[ndarray, " box"], max_iou: float) -> Int[ndarray, " kept"]:
    """Greedy non-maximum suppression: indices of the boxes to keep, highest score first.

    A box goes when it overlaps a kept one of higher score by more than `max_iou`.
    """
    order = np.argsort(-scores, kind="stable")
    overlap = overlaps(boxes, boxes)
    kept: list[int] = []
    for i in order:
        if not np.any(overlap[i, kept] > max_iou):
            kept.append(int(i))
    return np.array(kept, np.int64)


def round_out(box: Float[ndarray, " 4"], width: int, height: int) -> tuple[int, int, int, int]:
    """The smallest box of whole pixels that holds `box`, clipped to the picture, never empty."""
    x0 = min(max(int(np.floor(box[0])), 0), width - 1)
    y0 = min(max(int(np.floor(box[1])), 0), height - 1)
    x1 = min(max(int(np.ceil(box[2])), x0 + 1), width)
    y1 = min(max(int(np.ceil(box[3])), y0 + 1), height)
    return x0, y0, x1, y1


class SelfieSegmentation:
    """Masks of persons.

    Args:
        weights_dir: Folder of weights; None for the default one.

    Raises:
        WeightsError: The weights are not there.
    """

    def __init__(self, weights_dir: Path | None = None) -> None:
        self._network = cv2.dnn.readNetFromTFLite(str(weights.file("selfie_segmentation", weights_dir)))

    def segment(
        self, image: UInt8[ndarray, "height width 3"], boxes: Float32[ndarray, "box 4"]
    ) -> list[UInt8[ndarray, "rows columns"]]:
        """How much each pixel of each box, rounded out to whole pixels, belongs to the person in it: 0..255.

        `image` is RGB; boxes are x0, y0, x1, y1 in its pixels and must lie in it.
        """
        return [self._segment(image, box) for box in boxes]

    def _segment(
        self, image: UInt8[ndarray, "height width 3"], box: Float32[ndarray, " 4"]
    ) -> UInt8[ndarray, "rows columns"]:
        height, width = image.shape[:2]
        margin = np.tile((box[2:] - box[:2]) * _MARGIN, 2) * (-1, -1, 1, 1)
        left, top, right, bottom = round_out(box + margin, width, height)
        crop = image[top:bottom, left:right]
        pixels = cv2.resize(crop, (_SIDE_PX, _SIDE_PX), interpolation=cv2.INTER_AREA)
        self._network.setInput(cv2.dnn.blobFromImage(pixels, scalefactor=1 / 255))
        mask = self._network.forward().reshape(_SIDE_PX, _SIDE_PX)
        mask = cv2.resize(mask, (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)
        x0, y0, x1, y1 = round_out(box, width, height)
        mask = mask[y0 - top : y1 - top, x0 - left : x1 - left]
        return np.clip(mask * 255 + 0.5, 0, 255).astype(np.uint8)
