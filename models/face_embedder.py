"""Face embeddings: alignment by five landmarks, identity by dlib's network, sharpness.

Source: dlib's `dnn_face_recognition_ex` (a ResNet with 29 convolutions, metric loss, 128 numbers): pictures of the
same person lie less than about 0.6 apart in Euclidean distance.

Dimensions: face; landmark: 5 (eye on picture left, eye on picture right, nose, mouth left, mouth right); xy: 2.
"""

from pathlib import Path

import cv2
import dlib
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray

from models import weights
from models.image_encoder import DinoV2

ENCODED_SIDE_PX = 112
"""Side of an aligned face as the image encoder takes it: 8 of its patches."""

CHIP_PX = 150
"""Side of an aligned face, as dlib's network takes it."""

_PADDING = 0.25
"""dlib's own margin around the mean face, as a part of its size."""

_MEAN_FACE = np.array(
    # Eyes are the means of the six points around each eye in dlib's mean face, nose and mouth are single points.
    [[0.22549, 0.21599], [0.75476, 0.21599], [0.49013, 0.51563], [0.25415, 0.78023], [0.72610, 0.78023]],
    np.float32,
)
_ZOOM = 1.08
"""The mean face is spread by this around its middle. Measured: the landmarks of CenterFace, aligned without it, leave
0.05 between the mean distances of the farthest views of one person and of the two most alike persons; with it 0.09."""

_CHIP = (_PADDING + _MEAN_FACE) / (1 + 2 * _PADDING) * CHIP_PX
_REFERENCE_PX = (_CHIP - _CHIP.mean(axis=0)) * _ZOOM + _CHIP.mean(axis=0)


def align_face(
    image: UInt8[ndarray, "height width 3"], landmarks: Float[ndarray, "5 2"]
) -> UInt8[ndarray, "150 150 3"]:
    """Cut out a face, turned and scaled (never sheared) so that its landmarks lie where dlib's mean face has them."""
    matrix = similarity_transform(landmarks, _REFERENCE_PX)
    shrinks = np.hypot(*matrix[0, :2]) < 0.5
    if shrinks:  # bilinear sampling skips pixels when it shrinks by more than two; blur first
        sigma = 0.4 / np.hypot(*matrix[0, :2])
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    return cv2.warpAffine(image, matrix, (CHIP_PX, CHIP_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def similarity_transform(source: Float[ndarray, "point 2"], target: Float[ndarray, "point 2"]) -> Float[ndarray, "2 3"]:
    """The rotation, uniform scale and shift that best map `source` to `target` in the sense of least squares.

    Source: Umeyama, "Least-squares estimation of transformation parameters between two point patterns" (1991), in
    two dimensions, where complex numbers solve it directly.
    """
    a, b = (points[:, 0] + 1j * points[:, 1] for points in (source.astype(float), target.astype(float)))
    spread = np.vdot(a - a.mean(), a - a.mean()).real
    turn = np.vdot(a - a.mean(), b - b.mean()) / max(spread, 1e-12)
    shift = b.mean() - turn * a.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def measure_sharpness(chip: UInt8[ndarray, "rows columns 3"]) -> float:
    """Variance of the Laplacian of the grey picture (0..255 levels): low where it is blurred or was enlarged."""
    grey = cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


class DlibFace:
    """Identity embeddings of aligned faces.

    Args:
        weights_dir: Folder of weights; None for the default one.

    Raises:
        WeightsError: The weights are not there.
    """

    def __init__(self, weights_dir: Path | None = None) -> None:
        self._network = dlib.face_recognition_model_v1(str(weights.file("dlib_face", weights_dir)))

    def embed(self, chips: list[UInt8[ndarray, "150 150 3"]]) -> Float32[ndarray, "face 128"]:
        """Embed aligned RGB faces; compare embeddings by Euclidean distance."""
        vectors = [self._network.compute_face_descriptor(chip) for chip in chips]
        return np.array(vectors, np.float32).reshape(len(chips), 128)


def embed_appearance(encoder: DinoV2, chips: list[UInt8[ndarray, "side side 3"]]) -> Float32[ndarray, "face dim"]:
    """Conditioning embeddings of aligned RGB faces, each of length 1: the mean of the image encoder's patch tokens.

    Source: ours, in the place of FaRL (appendix A), which no registry package carries.
    """
    size = (ENCODED_SIDE_PX, ENCODED_SIDE_PX)
    pixels = np.stack([cv2.resize(chip, size, interpolation=cv2.INTER_AREA) for chip in chips])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.normalize(encoder.encode(images).mean(dim=1), dim=-1).numpy()
