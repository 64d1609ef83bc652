"""Finds the faces of each keyframe, matches each to its person, and embeds it twice.

A face is aligned by five landmarks. The conditioning embedding is what the story model and the renderer are given; the
identity embedding tells one person from another and serves the identities stage and the evaluation.

Source: paper section 3.3 and appendix B, which take FaRL for the embedding that conditions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.face_choice import FaceChoice
from stages.spec import Fail, Ok, Outcome, Row, Skip, StageConfig, StageSpec


class FacesConfig(StageConfig):
    """Settings of the faces stage."""

    models: FaceChoice = Field(FaceChoice(), description="what finds, describes and tells apart faces")
    min_score: float = Field(0.5, ge=0, le=1, description="score from which a detection counts")
    min_face_px: float = Field(16, gt=0, description="shorter side of the smallest face, in keyframe pixels")
    max_faces: int = Field(10, ge=1, description="faces kept in a keyframe, highest score first")
    jpeg_quality: int = Field(95, ge=1, le=100, description="quality of the stored aligned faces")

    def is_heavy(self) -> bool:
        """InsightFace and FaRL are."""
        return self.models.is_heavy()

    def weights(self) -> tuple[str, ...]:
        """Weights of the detector and both embedders."""
        return self.models.weights()

    def recipe(self) -> dict[str, Any]:
        """The choice of models stands beside the other settings."""
        values = super().recipe()
        del values["models"]
        return values | self.models.recipe()


SPEC = StageSpec(
    name="faces",
    version=1,
    implementation="stages.faces:Faces",
    inputs=("keyframes", "people"),
    output="faces",
    schema=pa.schema(
        [
            ("film_id", pa.string()),
            ("frame_index", pa.int64()),
            ("face_index", pa.int32()),
            ("person_index", pa.int32()),
            ("x0", pa.float32()),
            ("y0", pa.float32()),
            ("x1", pa.float32()),
            ("y1", pa.float32()),
            ("score", pa.float32()),
            ("landmarks", pa.list_(pa.float32())),
            ("sharpness", pa.float32()),
            ("embedding", pa.list_(pa.float32())),
            ("identity", pa.list_(pa.float32())),
            ("jpeg", pa.binary()),
        ]
    ),
    description="aligned faces with a conditioning and an identity embedding",
)

_HELD = 0.6
"""A face belongs to a person only when at least this part of it lies in the person's box."""


class Faces:
    """Detects, matches, aligns and embeds faces; see the module's first lines."""

    def __init__(self, config: FacesConfig, weights_dir: Path | None = None) -> None:
        self.config = config
        self._models = config.models.open(weights_dir)

    def __call__(self, *, keyframes: list[Row], people: list[Row]) -> Iterator[Outcome]:
        """One outcome a keyframe: its faces, `no_face`, or a failure where its JPEG cannot be read."""
        people_of: dict[int, list[Row]] = {}
        for person in people:
            people_of.setdefault(person["frame_index"], []).append(person)
        for keyframe in keyframes:
            yield self._look_at(keyframe, people_of.get(keyframe["frame_index"], []))

    def _look_at(self, keyframe: Row, people: list[Row]) -> Outcome:
        from models.face_embedder import align_face
        from models.pictures import decode_picture

        item = SPEC.item_of(keyframe)
        image = decode_picture(keyframe["jpeg"])
        if image is None:
            size = len(keyframe["jpeg"] or b"")
            return Fail(item, f"keyframe {item}: its JPEG of {size} bytes cannot be read; redo the keyframes stage")
        faces = self._models.detect(image, self.config.min_score)
        large = np.flatnonzero((faces.boxes[:, 2:] - faces.boxes[:, :2]).min(axis=1) >= self.config.min_face_px)
        kept = large[: self.config.max_faces]
        if not len(kept):
            return Skip(item, "no_face")
        boxes, landmarks = faces.boxes[kept], faces.landmarks[kept]
        chips = [align_face(image, points) for points in landmarks]
        columns = zip(
            match_people(boxes, people),
            boxes,
            faces.scores[kept],
            landmarks,
            chips,
            self._models.describe(chips),
            self._models.identify(image, landmarks, chips),
            strict=True,
        )
        return Ok(item, [self._row(keyframe, i, *face) for i, face in enumerate(columns)])

    def _row(
        self,
        keyframe: Row,
        index: int,
        person_index: int | None,
        box: np.ndarray,
        score: float,
        landmarks: np.ndarray,
        chip: np.ndarray,
        embedding: np.ndarray,
        identity: np.ndarray,
    ) -> dict[str, Any]:
        from models.face_embedder import measure_sharpness

        return {
            "film_id": keyframe["film_id"],
            "frame_index": keyframe["frame_index"],
            "face_index": index,
            "person_index": person_index,
            **{name: float(side) for name, side in zip(("x0", "y0", "x1", "y1"), box, strict=True)},
            "score": float(score),
            "landmarks": landmarks.ravel().tolist(),
            "sharpness": measure_sharpness(chip),
            "embedding": embedding.tolist(),
            "identity": identity.tolist(),
            "jpeg": _encode_jpeg(chip, self.config.jpeg_quality),
        }


def match_people(faces: np.ndarray, people: list[Row]) -> list[int | None]:
    """The `person_index` of each face (face, 4), or None: at most one face a person, best in all.

    A face must lie in the person's box; of several that do, the one nearest to where a head is wins: the middle of the
    box's upper edge.
    """
    from scipy.optimize import linear_sum_assignment

    from models.regions import contained

    matches: list[int | None] = [None] * len(faces)
    if not people:
        return matches
    boxes = np.array([[person[side] for side in ("x0", "y0", "x1", "y1")] for person in people])
    held = contained(faces, boxes)
    head = np.stack([(boxes[:, 0] + boxes[:, 2]) / 2, boxes[:, 1]], axis=1)
    centre = (faces[:, None, :2] + faces[:, None, 2:]) / 2
    away = np.linalg.norm((centre - head) / (boxes[:, 2:] - boxes[:, :2]), axis=-1)
    gain = np.where(held >= _HELD, held + 2 - np.minimum(away, 1), 0)
    for face, person in zip(*linear_sum_assignment(gain, maximize=True), strict=True):
        if gain[face, person] > 0:
            matches[face] = int(people[person]["person_index"])
    return matches


def _encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    import cv2

    _, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()
