"""Faces by InsightFace: SCRFD finds them, ArcFace tells one person from another.

Its models are for non-commercial research only: the licence is InsightFace's, and is told wherever they are used.

Source: the paper, appendix B takes face embeddings of the segmented characters; ArcFace (https://arxiv.org/abs/1801.07698)
for identity, because FaRL's embedding describes a face and does not identify it.
"""

from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from jaxtyping import Float32, UInt8
from numpy import ndarray

from models.face_detector import Faces
from models.face_embedder import similarity_transform
from models.weights import WeightsError

DETECTION_PX = 640
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
ARCFACE_PX = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""Where ArcFace has the five landmarks in its 112 by 112 pixels."""
LICENCE = "InsightFace's models: non-commercial research only"


class InsightFace:
    """A detector and an identity embedder out of one folder of ONNX files, such as `buffalo_l`.

    Args:
        folder: Where the files are; nothing is downloaded.

    Raises:
        WeightsError: The folder lacks one of the two models, or the package is not installed.
    """

    width = 512

    def __init__(self, folder: Path) -> None:
        if not list(folder.glob("*.onnx")):
            raise WeightsError(f"no InsightFace models at {folder}: expected a folder with .onnx files, as buffalo_l")
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise WeightsError(f"{error}: install `moviedreamer[paper]`") from error
        providers = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
        try:
            app = FaceAnalysis(str(folder), allowed_modules=["detection", "recognition"], providers=providers)
        except AssertionError:
            raise WeightsError(f"the folder {folder} holds no face detector") from None
        if "recognition" not in app.models:
            raise WeightsError(f"the folder {folder} holds no ArcFace model")
        app.prepare(ctx_id=0 if len(providers) > 1 else -1, det_size=(DETECTION_PX, DETECTION_PX))
        self._detector, self._recognition = app.models["detection"], app.models["recognition"]

    def detect(self, image: UInt8[ndarray, "height width 3"], min_score: float) -> Faces:
        """Faces of one RGB picture with a score of at least `min_score` (0..1), with their five landmarks."""
        self._detector.det_thresh = min_score
        boxes, landmarks = self._detector.detect(np.ascontiguousarray(image[:, :, ::-1]))
        height, width = image.shape[:2]
        order = np.argsort(-boxes[:, 4], kind="stable")
        corners = np.clip(boxes[order, :4], 0, (width, height, width, height)).astype(np.float32)
        points = landmarks[order] if len(order) else np.zeros((0, 5, 2))
        return Faces(corners, boxes[order, 4].astype(np.float32), points.astype(np.float32))

    def embed(
        self, image: UInt8[ndarray, "height width 3"], landmarks: Float32[ndarray, "face 5 2"]
    ) -> Float32[ndarray, "face 512"]:
        """Identity embeddings of the faces of an RGB picture, each of length 1."""
        if not len(landmarks):
            return np.zeros((0, self.width), np.float32)
        side = self._recognition.input_size[0]
        turned = np.ascontiguousarray(image[:, :, ::-1])
        target = ARCFACE_PX * side / 112
        chips = [cv2.warpAffine(turned, similarity_transform(p, target), (side, side)) for p in landmarks]
        vectors = self._recognition.get_feat(chips).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
