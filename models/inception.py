"""Inception-v3 as FID and IS use it: the network of 2015 with 1008 classes, from its converted weights.

Dimensions: picture; side = 299 pixels; feature = 2048 numbers of the last pooling; label = 1008 classes.

Source: https://arxiv.org/abs/1512.00567. The weights are those of FID's first implementation, in the layout in which
torch-fidelity and pytorch-fid publish them (`...inception-2015-12-05-6726825d.pth`). What differs from the network of
the paper is theirs: average pooling leaves out the padding, the last block pools by maximum, and pictures are scaled
as TensorFlow 1 scaled them, bilinear and without half-pixel centers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional

from models.pretrained import choose_device
from models.tensor_files import load_strictly, read_tensors

SIDE_PX = 299
FEATURES = 2048
LABELS = 1008
EPSILON = 1e-3
"""Of batch normalization."""

Step = tuple[str, int, int | tuple[int, int]]
"""A convolution: its name, channels out, and kernel."""


@dataclass(frozen=True)
class Branch:
    """One way through a block.

    Attributes:
        steps: Convolutions, one after the other.
        fork: Convolutions beside each other, after them.
        pool: What comes before them.
        stride: Of the last step, or of the pooling where there is no step.
    """

    steps: tuple[Step, ...] = ()
    fork: tuple[Step, ...] = ()
    pool: Literal["average", "max", None] = None
    stride: int = 1


class Convolution(nn.Module):
    """Convolution, batch normalization, ReLU."""

    def __init__(self, inward: int, outward: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inward, outward, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outward, eps=EPSILON)

    def forward(self, hidden: Tensor) -> Tensor:
        """Same height and width, where padded and without stride."""
        return functional.relu(self.bn(self.conv(hidden)))


class Block(nn.Module):
    """Branches beside each other, their channels put together."""

    def __init__(self, inward: int, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.branches, self.width = tuple(branches), 0
        for branch in branches:
            width = inward
            for index, (name, outward, kernel) in enumerate(branch.steps):
                stride = branch.stride if index == len(branch.steps) - 1 else 1
                self.add_module(name, Convolution(width, outward, kernel, stride, pad=stride == 1))
                width = outward
            for name, outward, kernel in branch.fork:
                self.add_module(name, Convolution(width, outward, kernel))
            self.width += sum(outward for _, outward, _ in branch.fork) or width

    def forward(self, hidden: Tensor) -> Tensor:
        """One picture's channels in, those of all branches out."""
        return torch.cat([self._follow(branch, hidden) for branch in self.branches], dim=1)

    def _follow(self, branch: Branch, hidden: Tensor) -> Tensor:
        if branch.pool == "average":
            hidden = functional.avg_pool2d(hidden, 3, 1, 1, count_include_pad=False)
        elif branch.pool == "max":
            hidden = functional.max_pool2d(hidden, 3, branch.stride, 1 if branch.stride == 1 else 0)
        for name, _, _ in branch.steps:
            hidden = self.get_submodule(name)(hidden)
        if not branch.fork:
            return hidden
        return torch.cat([self.get_submodule(name)(hidden) for name, _, _ in branch.fork], dim=1)


def _chain(prefix: str, *sizes: tuple[int, int | tuple[int, int]]) -> tuple[Step, ...]:
    return tuple((f"{prefix}_{number}", *size) for number, size in enumerate(sizes, 1))


def _describe_a(pooled: int) -> list[Branch]:
    return [
        Branch((("branch1x1", 64, 1),)),
        Branch(_chain("branch5x5", (48, 1), (64, 5))),
        Branch(_chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))),
        Branch((("branch_pool", pooled, 1),), pool="average"),
    ]


def _describe_b() -> list[Branch]:
    return [
        Branch((("branch3x3", 384, 3),), stride=2),
        Branch(_chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)), stride=2),
        Branch(pool="max", stride=2),
    ]


def _describe_c(inner: int) -> list[Branch]:
    wide, high = (1, 7), (7, 1)
    return [
        Branch((("branch1x1", 192, 1),)),
        Branch(_chain("branch7x7", (inner, 1), (inner, wide), (192, high))),
        Branch(_chain("branch7x7dbl", (inner, 1), (inner, high), (inner, wide), (inner, high), (192, wide))),
        Branch((("branch_pool", 192, 1),), pool="average"),
    ]


def _describe_d() -> list[Branch]:
    return [
        Branch(_chain("branch3x3", (192, 1), (320, 3)), stride=2),
        Branch(_chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)), stride=2),
        Branch(pool="max", stride=2),
    ]


def _describe_e(pool: Literal["average", "max"]) -> list[Branch]:
    def fork(name: str) -> tuple[Step, ...]:
        return ((f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1)))

    return [
        Branch((("branch1x1", 320, 1),)),
        Branch(_chain("branch3x3", (384, 1)), fork("branch3x3_2")),
        Branch(_chain("branch3x3dbl", (448, 1), (384, 3)), fork("branch3x3dbl_3")),
        Branch((("branch_pool", 192, 1),), pool=pool),
    ]


BLOCKS = {
    "Mixed_5b": _describe_a(32), "Mixed_5c": _describe_a(64), "Mixed_5d": _describe_a(64), "Mixed_6a": _describe_b(),
    "Mixed_6b": _describe_c(128), "Mixed_6c": _describe_c(160), "Mixed_6d": _describe_c(160),
    "Mixed_6e": _describe_c(192), "Mixed_7a": _describe_d(), "Mixed_7b": _describe_e("average"),
    "Mixed_7c": _describe_e("max"),
}  # fmt: skip


class InceptionV3(nn.Module):
    """The network, its parts named as upstream's file names them."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, pad=False)
        width = 192
        for name, branches in BLOCKS.items():
            block = Block(width, branches)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, LABELS)

    def forward(
        self, images: Float[Tensor, "picture 3 299 299"]
    ) -> tuple[Float[Tensor, "picture 2048"], Float[Tensor, "picture 1008"]]:
        """Features and logits of RGB pictures in -1..1; the logits without their bias, as IS was first computed."""
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        hidden = functional.max_pool2d(hidden, 3, 2)
        hidden = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden)), 3, 2)
        for name in BLOCKS:
            hidden = self.get_submodule(name)(hidden)
        features = hidden.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


class Inception:
    """Features and logits of pictures of any size.

    Args:
        place: The upstream file, what `weights pull` made of it, or the folder of either.
        device: Where it runs; None takes an accelerator where there is one.

    Raises:
        WeightsError: The file is not Inception's.
    """

    def __init__(self, place: Path, device: str | None = None) -> None:
        self._device = choose_device(device)
        self._model = load_inception(place).to(self._device)

    @torch.inference_mode()
    def __call__(
        self, pictures: Sequence[UInt8[ndarray, "height width 3"]]
    ) -> tuple[Float32[ndarray, "picture 2048"], Float32[ndarray, "picture 1008"]]:
        """Look at RGB pictures; each is scaled to 299x299 as a whole, whatever its shape."""
        images = torch.stack([scale_picture(torch.from_numpy(np.ascontiguousarray(p))) for p in pictures])
        features, logits = self._model(((images - 128) / 128).to(self._device))
        return features.float().cpu().numpy(), logits.float().cpu().numpy()


def load_inception(place: Path) -> InceptionV3:
    """The network in evaluation mode.

    Raises:
        WeightsError: The file is not Inception's.
    """
    what = "FID's Inception-v3 (...inception-2015-12-05-6726825d)"
    return load_strictly(what, place, InceptionV3(), read_tensors(what, place))


def scale_picture(picture: UInt8[Tensor, "height width 3"]) -> Float[Tensor, "3 299 299"]:
    """Scale to 299x299 as TensorFlow 1 did: bilinear, pixel 0 on pixel 0, no smoothing; 0..255."""
    rows, columns = (_weigh(size) for size in picture.shape[:2])
    return rows @ picture.permute(2, 0, 1).float() @ columns.T


def _weigh(size: int) -> Float[Tensor, "299 source"]:
    """What each source line gives to each of the 299."""
    place = torch.arange(SIDE_PX, dtype=torch.float32) * (size / SIDE_PX)
    first = place.floor().long().clamp(max=size - 1)
    second, share = (first + 1).clamp(max=size - 1), place - first
    weights = torch.zeros(SIDE_PX, size)
    lines = torch.arange(SIDE_PX)
    weights[lines, first] += 1 - share
    weights[lines, second] += share
    return weights
