"""Groups the faces of a film into characters, in the order of their screen time.

Good faces are clustered by the distance of their identity embeddings; small, blurred or uncertain ones join the
nearest character afterwards if they are near enough. What fits nowhere stays, unclustered. Training draws another face
of the same character from this table.

Source: paper section 3.3, "face embedding randomization": a character's face is taken from another keyframe.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.spec import Ok, Outcome, Row, StageConfig, StageSpec


class IdentitiesConfig(StageConfig):
    """Settings of the identities stage. Distances are Euclidean, between identity embeddings."""

    method: Literal["average_linkage"] = Field("average_linkage", description="how good faces are clustered")
    max_distance: float = Field(0.58, gt=0, description="mean distance up to which clusters of faces merge")
    max_join_distance: float = Field(0.4, gt=0, description="distance to a centroid up to which a poor face joins it")
    min_score: float = Field(0.75, ge=0, le=1, description="detection score of a face that may form a cluster")
    min_face_px: float = Field(20, ge=0, description="shorter side of a face that may form a cluster")
    min_sharpness: float = Field(2, ge=0, description="sharpness of a face that may form a cluster")
    min_cluster_faces: int = Field(3, ge=1, description="faces that make a character")
    max_clustered_faces: int = Field(8000, ge=2, description="sharpest faces that are clustered; the rest join them")
    representatives: int = Field(5, ge=1, description="representative faces of a character")


SPEC = StageSpec(
    name="identities",
    version=1,
    implementation="stages.identities:Identities",
    inputs=("faces",),
    output="identities",
    schema=pa.schema(
        [
            ("film_id", pa.string()),
            ("frame_index", pa.int64()),
            ("face_index", pa.int32()),
            ("character_index", pa.int32()),
            ("distance", pa.float32()),
            ("representative", pa.bool_()),
        ]
    ),
    key=("frame_index", "face_index"),
    scope="film",
    description="the characters of a film",
)


class Identities:
    """Clusters the faces of one film; see the module's first lines."""

    def __init__(self, config: IdentitiesConfig, weights_dir: Path | None = None) -> None:
        self.config = config

    def __call__(self, *, faces: list[Row]) -> Iterator[Outcome]:
        """One outcome a face, in the order of `faces`; the result does not depend on that order."""
        ordered = sorted(faces, key=lambda face: (face["frame_index"], face["face_index"]))
        rows = {(row["frame_index"], row["face_index"]): row for row in self._rows(ordered)} if ordered else {}
        for face in faces:
            yield Ok(SPEC.item_of(face), [rows[face["frame_index"], face["face_index"]]])

    def _rows(self, faces: list[Row]) -> Iterator[Row]:
        from models.face_clusters import choose_representatives, find_centroids

        identities = np.array([face["identity"] for face in faces], np.float64)
        frames = np.array([face["frame_index"] for face in faces])
        labels = self._characters(identities, frames, faces)
        centroids = find_centroids(identities, labels)
        quality = np.array([face["sharpness"] * face["score"] for face in faces])
        marked = choose_representatives(labels, frames, quality, self.config.representatives)
        for face, identity, label, representative in zip(faces, identities, labels, marked, strict=True):
            known = int(label) >= 0
            yield {
                "film_id": face["film_id"],
                "frame_index": face["frame_index"],
                "face_index": face["face_index"],
                "character_index": int(label) if known else None,
                "distance": float(np.linalg.norm(identity - centroids[int(label)])) if known else None,
                "representative": bool(representative),
            }

    def _characters(self, identities: np.ndarray, frames: np.ndarray, faces: list[Row]) -> np.ndarray:
        """The character of each face (-1 for none), characters in order of screen time."""
        from models import face_clusters

        good, sharpness = self._good(faces), np.array([face["sharpness"] for face in faces])
        sharpest = np.argsort(np.where(good, -sharpness, np.inf), kind="stable")[: self.config.max_clustered_faces]
        clustered = np.sort(sharpest[good[sharpest]])
        labels = np.full(len(faces), -1)
        found = face_clusters.cluster_faces(identities[clustered], frames[clustered], self.config.max_distance)
        labels[clustered] = face_clusters.drop_small_clusters(found, self.config.min_cluster_faces)
        others = np.ones(len(faces), bool)
        others[clustered] = False
        labels = face_clusters.join_nearest(identities, frames, labels, others, self.config.max_join_distance)
        return face_clusters.rank_by_screen_time(labels, frames)

    def _good(self, faces: list[Row]) -> np.ndarray:
        """Which faces are clear enough to form clusters."""
        side = np.array([min(face["x1"] - face["x0"], face["y1"] - face["y0"]) for face in faces])
        score = np.array([face["score"] for face in faces])
        sharpness = np.array([face["sharpness"] for face in faces])
        limits = self.config
        return (score >= limits.min_score) & (side >= limits.min_face_px) & (sharpness >= limits.min_sharpness)
