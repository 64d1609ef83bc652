"""Person detector: SSDLite on MobileNetV2, read from a frozen TensorFlow graph into plain PyTorch.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (SSDLite); anchors, box coding and
input range as in the TensorFlow object detection API's `ssd_mobilenet_v2`.

Dimensions: batch; height, width: pixels; anchor: all anchors of all maps; box: what is left after suppression; xyxy: 4.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray
from torch import Tensor, nn

from models import weights
from models.regions import overlaps, suppress

SIDE_PX = 300
"""Side of the square that the network was trained on."""

_SUPPRESSION_IOU = 0.45
_MIN_CANDIDATE_SCORE = 0.05
_CUT_MARGIN = 0.01
"""A box that ends this close to a window's inner edge, as a part of the window, was cut off by it."""

_SCALES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
"""Anchor scale of each of the six feature maps, and the one past the last."""


class Convolution(nn.Module):
    """A convolution with TensorFlow's `SAME` padding, batch norm folded into it, and an optional ReLU6."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, groups: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.groups, self.relu = stride, groups, relu

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        top, bottom = self._padding(x.shape[-2], kernel)
        left, right = self._padding(x.shape[-1], kernel)
        if (top, left) != (bottom, right):  # SAME puts the odd pixel at the bottom and right
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        x = F.conv2d(x, self.weight, self.bias, self.stride, (top, left), groups=self.groups)
        return F.relu6(x, inplace=True) if self.relu else x

    def _padding(self, size: int, kernel: int) -> tuple[int, int]:
        total = max((-(-size // self.stride) - 1) * self.stride + kernel - size, 0)
        return total // 2, total - total // 2


class FrozenGraph:
    """The constants of a frozen TensorFlow graph, as convolutions with their batch norm folded in."""

    def __init__(self, path: Path) -> None:
        # tensorboard carries the protobuf of a TensorFlow graph; TensorFlow itself is not needed.
        from tensorboard.compat.proto.graph_pb2 import GraphDef

        graph = GraphDef()
        graph.ParseFromString(path.read_bytes())
        self._tensors = {node.name: node.attr["value"].tensor for node in graph.node if node.op == "Const"}
        self._epsilon = {
            node.name.rsplit("/", 1)[0]: node.attr["epsilon"].f for node in graph.node if node.op == "FusedBatchNorm"
        }
        self._strides = {
            node.name.rsplit("/", 1)[0]: node.attr["strides"].list.i[1]
            for node in graph.node
            if node.op in ("Conv2D", "DepthwiseConv2dNative")
        }

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def array(self, name: str) -> ndarray:
        """The float32 constant `name`, in TensorFlow's layout."""
        tensor = self._tensors[name]
        shape = [d.size for d in tensor.tensor_shape.dim]
        values = np.frombuffer(tensor.tensor_content, np.float32) if tensor.tensor_content else tensor.float_val
        return np.broadcast_to(np.asarray(values, np.float32), (int(np.prod(shape)),)).reshape(shape)

    def convolution(self, scope: str, relu: bool = True) -> Convolution:
        """The convolution in `scope`, plain or depthwise, with its batch norm or bias."""
        depthwise = f"{scope}/depthwise_weights" in self
        if depthwise:
            weight = self.array(f"{scope}/depthwise_weights").transpose(2, 3, 0, 1)
        else:
            weight = self.array(f"{scope}/weights").transpose(3, 2, 0, 1)
        if f"{scope}/biases" in self:
            bias = self.array(f"{scope}/biases")
        else:
            gain, bias = self._batch_norm(f"{scope}/BatchNorm")
            weight = weight * gain[:, None, None, None]
        groups = weight.shape[0] if depthwise else 1
        return Convolution(torch.tensor(weight), torch.tensor(bias), self._strides[scope], groups, relu)

    def _batch_norm(self, scope: str) -> tuple[ndarray, ndarray]:
        gamma, beta, mean, variance = (
            self.array(f"{scope}/{name}") for name in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        gain = gamma / np.sqrt(variance + self._epsilon[scope])
        return gain, beta - mean * gain


class Block(nn.Module):
    """An inverted residual block: expand, depthwise, project; `expansion` is kept because one map is read there."""

    def __init__(self, graph: FrozenGraph, scope: str) -> None:
        super().__init__()
        self.expand = graph.convolution(f"{scope}/expand")
        self.depthwise = graph.convolution(f"{scope}/depthwise")
        self.project = graph.convolution(f"{scope}/project", relu=False)
        self.residual = self.depthwise.stride == 1 and self.expand.weight.shape[1] == self.project.weight.shape[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        expansion = self.expand(x)
        y = self.project(self.depthwise(expansion))
        return (x + y if self.residual else y), expansion


class Head(nn.Module):
    """Box offsets and person logits of one feature map."""

    def __init__(self, graph: FrozenGraph, scope: str) -> None:
        super().__init__()
        self.box = nn.Sequential(
            graph.convolution(f"{scope}/BoxEncodingPredictor_depthwise"),
            graph.convolution(f"{scope}/BoxEncodingPredictor", relu=False),
        )
        self.person = nn.Sequential(
            graph.convolution(f"{scope}/ClassPredictor_depthwise"),
            graph.convolution(f"{scope}/ClassPredictor", relu=False),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        box = self.box(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4)
        # Two classes, background and person, each an independent sigmoid.
        person = self.person(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 2)[..., 1]
        return box, person


class SSDLite(nn.Module):
    """The network. `forward` maps pictures to every anchor's box and person score."""

    def __init__(self, graph_file: Path) -> None:
        super().__init__()
        graph = FrozenGraph(graph_file)
        trunk = "FeatureExtractor/MobilenetV2"
        self.stem = nn.Sequential(
            graph.convolution(f"{trunk}/Conv"),
            graph.convolution(f"{trunk}/expanded_conv/depthwise"),
            graph.convolution(f"{trunk}/expanded_conv/project", relu=False),
        )
        self.blocks = nn.ModuleList(Block(graph, f"{trunk}/expanded_conv_{i}") for i in range(1, 17))
        self.last = graph.convolution(f"{trunk}/Conv_1")
        extras = ((2, "256", "512"), (3, "128", "256"), (4, "128", "256"), (5, "64", "128"))
        self.extras = nn.ModuleList(
            nn.Sequential(
                graph.convolution(f"{trunk}/layer_19_1_Conv2d_{i}_1x1_{narrow}"),
                graph.convolution(f"{trunk}/layer_19_2_Conv2d_{i}_3x3_s2_{wide}_depthwise"),
                graph.convolution(f"{trunk}/layer_19_2_Conv2d_{i}_3x3_s2_{wide}"),
            )
            for i, narrow, wide in extras
        )
        self.heads = nn.ModuleList(Head(graph, f"BoxPredictor_{i}") for i in range(6))

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch anchor xyxy"], Float[Tensor, "batch anchor"]]:
        """Boxes as fractions of the picture (x0, y0, x1, y1) and scores in 0..1; `images` are RGB in 0..1."""
        maps = self._feature_maps(images * 2 - 1)
        offsets, logits = zip(*(head(x) for head, x in zip(self.heads, maps, strict=True)), strict=True)
        anchors = torch.cat([_anchors(level, x.shape[-2], x.shape[-1]) for level, x in enumerate(maps)])
        return _decode(torch.cat(offsets, dim=1), anchors.to(images)), torch.cat(logits, dim=1).sigmoid()

    def _feature_maps(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for i, block in enumerate(self.blocks, start=1):
            x, expansion = block(x)
            if i == 13:  # the last block that halves the picture: its input resolution is the finest map
                maps.append(expansion)
        x = self.last(x)
        maps.append(x)
        for extra in self.extras:
            x = extra(x)
            maps.append(x)
        return maps


def _anchors(level: int, rows: int, columns: int) -> Tensor:
    """Anchors of one map as (centre y, centre x, height, width), fractions of the picture."""
    scale = _SCALES[level]
    if level == 0:
        shapes = [(0.1, 1.0), (scale, 2.0), (scale, 0.5)]
    else:
        shapes = [(scale, aspect) for aspect in (1.0, 2.0, 0.5, 3.0, 1 / 3)]
        shapes.append(((scale * _SCALES[level + 1]) ** 0.5, 1.0))
    sizes = torch.tensor([(size / aspect**0.5, size * aspect**0.5) for size, aspect in shapes])
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    centres = torch.stack([y, x], dim=-1).reshape(-1, 1, 2).expand(-1, len(shapes), 2)
    return torch.cat([centres, sizes.expand(rows * columns, -1, -1)], dim=-1).reshape(-1, 4)


def _decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    centre = offsets[..., :2] / 10 * anchors[:, 2:] + anchors[:, :2]
    half = (offsets[..., 2:] / 5).exp() * anchors[:, 2:] / 2
    return torch.cat([(centre - half).flip(-1), (centre + half).flip(-1)], dim=-1)


@dataclass(frozen=True)
class Persons:
    """Persons of one picture, highest score first, in pixels of that picture."""

    boxes: Float32[ndarray, "person 4"]
    scores: Float32[ndarray, " person"]


class PersonDetector:
    """Finds persons in pictures of any size and shape.

    The network takes a square, so a picture that is much longer than it is wide is also looked at through overlapping
    windows along its long side; and every view is looked at mirrored too, the scores of both averaged.

    Args:
        weights_dir: Folder of weights; None for the default one.

    Raises:
        WeightsError: The weights are not there.
    """

    def __init__(self, weights_dir: Path | None = None) -> None:
        network = SSDLite(weights.file("ssdlite_person", weights_dir)).eval()
        self._network = network.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def detect(self, image: UInt8[ndarray, "height width 3"], min_score: float) -> Persons:
        """Find the persons of one RGB picture whose score is at least `min_score` (0..1)."""
        height, width = image.shape[:2]
        windows = _windows(width, height)
        batch = torch.cat([_square(image[y0:y1, x0:x1]) for x0, y0, x1, y1 in windows])
        plain = self._network(batch)
        mirrored = self._network(batch.flip(-1))
        found = []
        for i, window in enumerate(windows):
            boxes, scores = _fuse(_candidates(plain, i), _candidates(mirrored, i, mirrored=True))
            found.append(_place(boxes, scores, window, width, height))
        boxes = np.concatenate([boxes for boxes, _ in found])
        scores = np.concatenate([scores for _, scores in found])
        kept = suppress(boxes, scores, _SUPPRESSION_IOU)
        kept = kept[scores[kept] >= min_score]
        return Persons(boxes[kept], scores[kept])


def _windows(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The whole picture, and windows of 3:2 along the long side where it is more than twice the short one."""
    whole = (0, 0, width, height)
    long, short = max(width, height), min(width, height)
    if long <= 2 * short:
        return [whole]
    side = round(1.5 * short)
    starts = [round(start) for start in np.linspace(0, long - side, math.ceil(long / side))]
    if width >= height:
        return [whole, *((start, 0, start + side, height) for start in starts)]
    return [whole, *((0, start, width, start + side) for start in starts)]


def _square(image: UInt8[ndarray, "height width 3"]) -> Float[Tensor, "1 3 300 300"]:
    shrinks = min(image.shape[:2]) > SIDE_PX
    pixels = cv2.resize(image, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    # An N x H x W x C array seen as N x C x H x W is what PyTorch calls channels_last, its faster layout here.
    return torch.from_numpy(pixels).float().div(255)[None].permute(0, 3, 1, 2)


def _candidates(output: tuple[Tensor, Tensor], index: int, mirrored: bool = False) -> tuple[ndarray, ndarray]:
    """Boxes (fractions of the view, clipped to it) and scores of one view, after suppression."""
    boxes, scores = output[0][index].numpy(), output[1][index].numpy()
    boxes, scores = boxes[scores >= _MIN_CANDIDATE_SCORE], scores[scores >= _MIN_CANDIDATE_SCORE]
    if mirrored:
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    boxes = np.clip(boxes, 0, 1)
    kept = suppress(boxes, scores, _SUPPRESSION_IOU)
    return boxes[kept], scores[kept]


def _fuse(first: tuple[ndarray, ndarray], second: tuple[ndarray, ndarray]) -> tuple[ndarray, ndarray]:
    """Pair the boxes of two looks at the same view; average boxes by score, and scores with 0 for what is missing."""
    boxes, scores = first[0].copy(), first[1] / 2
    added = []
    overlap = overlaps(second[0], first[0])
    free = np.ones(len(scores), bool)
    for i, score in enumerate(second[1]):
        partners = np.flatnonzero(free & (overlap[i] > _SUPPRESSION_IOU))
        if not len(partners):
            added.append(i)
            continue
        j = partners[overlap[i, partners].argmax()]
        free[j] = False
        share = score / (score + first[1][j])
        boxes[j] = (1 - share) * first[0][j] + share * second[0][i]
        scores[j] += score / 2
    return np.concatenate([boxes, second[0][added]]), np.concatenate([scores, second[1][added] / 2])


def _place(
    boxes: ndarray, scores: ndarray, window: tuple[int, int, int, int], width: int, height: int
) -> tuple[ndarray, ndarray]:
    """Bring boxes of a window into the picture; drop those that the window's inner edges cut off."""
    x0, y0, x1, y1 = window
    sides = np.array([x1 - x0, y1 - y0] * 2, np.float32)
    placed = boxes * sides + np.array([x0, y0] * 2, np.float32)
    inner = np.array([x0 > 0, y0 > 0, x1 < width, y1 < height])
    edges = np.array(window, np.float32)
    cut = (inner & (np.abs(placed - edges) < _CUT_MARGIN * sides)).any(axis=1)
    return placed[~cut].astype(np.float32), scores[~cut].astype(np.float32)
