"""Face detector with five landmarks: CenterFace, run by onnxruntime.

Source: Xu et al., "CenterFace: Joint Face Detection and Alignment Using Face as Point" (2019): a heat map of face
centres at a quarter of the input's resolution, with size, offset and landmarks beside each point.

Dimensions: height, width: pixels; face: found faces; xyxy: 4; landmark: 5 (eye on picture left, eye on picture
right, nose, mouth left, mouth right); xy: 2.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
from jaxtyping import Float32, UInt8
from numpy import ndarray

from models import weights
from models.regions import suppress

_STEP_PX = 4
"""Pixels of the network's input to one cell of its heat map."""

_SUPPRESSION_IOU = 0.3


@dataclass(frozen=True)
class Faces:
    """Faces of one picture, highest score first, in pixels of that picture."""

    boxes: Float32[ndarray, "face 4"]
    scores: Float32[ndarray, " face"]
    landmarks: Float32[ndarray, "face 5 2"]

    def __len__(self) -> int:
        return len(self.scores)


class CenterFace:
    """Finds faces in pictures of any size.

    Args:
        weights_dir: Folder of weights; None for the default one.
        long_side_px: The picture's long side is scaled to this before detection.

    Raises:
        WeightsError: The weights are not there.
    """

    def __init__(self, weights_dir: Path | None = None, long_side_px: int = 640) -> None:
        options = onnxruntime.SessionOptions()
        # A network this small gains little from threads, and the runtime's threads spin while they wait.
        options.intra_op_num_threads = 1
        # Threads that spin while they wait would take the cores of other workers on the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # the export carries counters that no node reads; each would be a warning
        model = _with_free_dimensions(onnx.load(weights.file("centerface", weights_dir)))
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._long_side_px = long_side_px

    def detect(self, image: UInt8[ndarray, "height width 3"], min_score: float) -> Faces:
        """Find the faces of one RGB picture whose score is at least `min_score` (0..1)."""
        height, width = image.shape[:2]
        scale = self._long_side_px / max(height, width)
        # The network halves its input five times; whole multiples of 32 keep its maps aligned.
        rows, columns = (max(32, round(side * scale / 32) * 32) for side in (height, width))
        shrinks = rows < height
        pixels = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        maps = self._session.run(None, {"input.1": pixels.transpose(2, 0, 1)[None].astype(np.float32)})
        faces = _decode(*(m[0] for m in maps), min_score)
        stretch = np.array([width / columns, height / rows], np.float32)
        boxes = np.clip(faces.boxes * np.tile(stretch, 2), 0, np.array([width, height] * 2, np.float32))
        return Faces(boxes.astype(np.float32), faces.scores, faces.landmarks * stretch)


def _with_free_dimensions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let the graph take any picture: it was exported for a batch of ten at 32 x 32."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for value in [*model.graph.input, *model.graph.output]:
        for axis in (0, 2, 3):
            value.type.tensor_type.shape.dim[axis].dim_param = f"{value.name}_{axis}"
    return model


def _decode(heat: ndarray, size: ndarray, offset: ndarray, points: ndarray, min_score: float) -> Faces:
    """Faces in pixels of the network's input; the maps are (channel, row, column), each pair ordered y, x."""
    row, column = np.nonzero(heat[0] >= min_score)
    scores = heat[0, row, column]
    sides = np.exp(size[:, row, column]) * _STEP_PX
    centre = (np.stack([row, column]) + offset[:, row, column] + 0.5) * _STEP_PX
    top_left, bottom_right = centre - sides / 2, centre + sides / 2
    boxes = np.concatenate([top_left[::-1], bottom_right[::-1]]).T.astype(np.float32)
    pairs = points[:, row, column].reshape(5, 2, -1) * sides + top_left
    landmarks = pairs[:, ::-1].transpose(2, 0, 1).astype(np.float32)
    kept = suppress(boxes, scores, _SUPPRESSION_IOU)
    return Faces(boxes[kept], scores[kept], landmarks[kept])
