"""The three models that look at faces, chosen by name: one finds them, one describes them, one tells whose they are.

Dimensions: face; landmark: 5; dim: width of an embedding.
"""

from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float32, UInt8
from numpy import ndarray

from models.face_detector import Faces
from models.weights import locate

Detector = Literal["centerface", "insightface"]
Conditioning = Literal["dinov2", "farl"]
Identity = Literal["dlib", "arcface"]


class FaceModels:
    """A detector, a conditioning embedder and an identity embedder.

    Args:
        detector: Finds faces.
        conditioning: Its embedding is given to the story model and the renderer.
        identity: Its embedding tells persons apart.
        insightface: Folder or name of InsightFace's models, where one of them is.
        farl: File or name of FaRL, where it is.
        weights_dir: Folder of weights; None for the default one.

    Raises:
        WeightsError: Some of the weights are not there.
    """

    def __init__(
        self,
        detector: Detector,
        conditioning: Conditioning,
        identity: Identity,
        insightface: str = "",
        farl: str = "",
        weights_dir: Path | None = None,
    ) -> None:
        self._insightface: Any = None
        if detector == "insightface" or identity == "arcface":
            from models.insight_face import InsightFace

            self._insightface = InsightFace(locate(insightface, weights_dir))
        self._detector, self._identity, self._farl = self._insightface, None, None
        if detector == "centerface":
            from models.face_detector import CenterFace

            self._detector = CenterFace(weights_dir)
        if identity == "dlib":
            from models.face_embedder import DlibFace

            self._identity = DlibFace(weights_dir)
        if conditioning == "farl":
            from models.farl import Farl

            self._farl = Farl(_only_file(locate(farl, weights_dir)))
        else:
            from models.image_encoder import DinoV2

            self._encoder = DinoV2(weights_dir)

    def detect(self, image: UInt8[ndarray, "height width 3"], min_score: float) -> Faces:
        """Faces of one RGB picture with a score of at least `min_score` (0..1), best first."""
        return self._detector.detect(image, min_score)

    def describe(self, chips: list[UInt8[ndarray, "side side 3"]]) -> Float32[ndarray, "face dim"]:
        """Conditioning embeddings of aligned RGB faces, each of length 1."""
        if self._farl is not None:
            return self._farl.embed(chips)
        from models.face_embedder import embed_appearance

        return embed_appearance(self._encoder, chips)

    def identify(
        self,
        image: UInt8[ndarray, "height width 3"],
        landmarks: Float32[ndarray, "face 5 2"],
        chips: list[UInt8[ndarray, "side side 3"]],
    ) -> Float32[ndarray, "face dim"]:
        """Identity embeddings of the faces of a picture, given also aligned; compare them by Euclidean distance."""
        if self._identity is not None:
            return self._identity.embed(chips)
        return self._insightface.embed(image, landmarks)


def _only_file(path: Path) -> Path:
    """FaRL's file, where its folder is given."""
    found = [p for kind in ("*.safetensors", "*.pth") for p in sorted(path.glob(kind))] if path.is_dir() else []
    return found[0] if found else path
