"""Where one shot ends and the next begins, told from keyframes alone.

Two pictures belong to one shot when their EfficientNet-lite0 features point the same way. A picture with nothing to
see, as in a fade through black, has no such features: the shot ends where it appears, and what fades in from it is
one shot with it.

Dimension names: batch; channel, height, width of a feature map, with 2 where a layer changes them; feature = 1280;
label = 1000.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

INPUT_PX = 224
THUMBNAIL_PX = (64, 36)
BLANK_CONTRAST = 3.0 / 255  # noise in black stays below it at thumbnail size, dark scenes do not
# Blocks of EfficientNet-lite0: repeats, kernel, stride of the first, expansion, channels in, channels out.
BLOCKS = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the odd pixel goes to the right and the bottom."""

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel2 height2 width2"]:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return self._conv_forward(functional.pad(x, pads), self.weight, self.bias)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class MBConv(nn.Module):
    """Inverted residual block: expand, depthwise convolution, project. Attribute names are the checkpoint's."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.is_residual = stride == 1 and inputs == outputs
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = SameConv(inputs, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = SameConv(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = SameConv(width, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel2 height2 width2"]:
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0 up to its pooled features; the ImageNet head is loaded so that the checkpoint fits strictly.

    Source: Tan and Le 2019, "EfficientNet"; the lite variant (no squeeze-and-excitation, ReLU6) of
    tensorflow/tpu, models/official/efficientnet/lite.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList(
            MBConv(kernel, stride if number == 0 else 1, expansion, inputs if number == 0 else outputs, outputs)
            for repeats, kernel, stride, expansion, inputs, outputs in BLOCKS
            for number in range(repeats)
        )
        self._conv_head = SameConv(320, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch feature"]:
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return functional.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def classify(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch label"]:
        """ImageNet logits of pooled features."""
        return self._fc(features)


def load_efficientnet(path: Path) -> EfficientNetLite0:
    """Load the packaged checkpoint; code in it is refused and every tensor must fit."""
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def to_input(rgb: UInt8[np.ndarray, "height width 3"]) -> Float[Tensor, "1 3 224 224"]:
    """The whole picture squeezed to the network's square input, in -1..1."""
    small = cv2.resize(rgb, (INPUT_PX, INPUT_PX), interpolation=cv2.INTER_AREA)
    return (torch.from_numpy(small)[None].permute(0, 3, 1, 2).float() - 127.0) / 128.0


def to_thumbnail(rgb: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "36 64"]:
    """Luma (ITU-R BT.601) of a small copy, 0..1."""
    small = cv2.resize(rgb, THUMBNAIL_PX, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for a network so small that threads gain nothing and, on a busy machine, wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class Observation:
    """What a keyframe tells of its shot.

    Attributes:
        shot_index: The shot it belongs to, from 0.
        similarity: Cosine of its features to those of the keyframe before, -1..1; None for the first keyframe.
        motion: Mean absolute luma difference to the keyframe before, 0..1; None for the first keyframe of a shot.
        luma: Mean luma, 0..1.
    """

    shot_index: int
    similarity: float | None
    motion: float | None
    luma: float


class ShotTracker:
    """Follows the shots of one film, keyframe by keyframe.

    Args:
        network: From `load_efficientnet`.
        min_similarity: Cosine from which two keyframes count as one shot.
    """

    def __init__(self, network: EfficientNetLite0, min_similarity: float) -> None:
        self._network, self._min_similarity = network, min_similarity
        self._features: np.ndarray | None = None
        self._thumbnail: np.ndarray | None = None
        self._shot_index = 0

    @torch.inference_mode()
    def add(self, rgb: UInt8[np.ndarray, "height width 3"]) -> Observation:
        """Take the next keyframe in presentation order, 0..255."""
        with single_thread():
            features = self._network(to_input(rgb))[0].double().numpy()
        thumbnail = to_thumbnail(rgb)
        similarity = motion = None
        if self._features is not None:
            norms = np.linalg.norm(features) * np.linalg.norm(self._features)
            similarity = float(features @ self._features / max(norms, 1e-12))
            if self._is_new_shot(thumbnail, similarity):
                self._shot_index += 1
            else:
                motion = float(np.abs(thumbnail - self._thumbnail).mean())
        self._features, self._thumbnail = features, thumbnail
        return Observation(self._shot_index, similarity, motion, float(thumbnail.mean()))

    def _is_new_shot(self, thumbnail: np.ndarray, similarity: float) -> bool:
        was_blank = self._thumbnail.std() < BLANK_CONTRAST
        is_blank = thumbnail.std() < BLANK_CONTRAST
        if was_blank or is_blank:
            return bool(is_blank and not was_blank)
        return similarity < self._min_similarity
