"""Finds the persons of each keyframe: box, score and mask, at most five, highest score first.

A person detector looks at the keyframe; a face that none of its boxes holds adds a box for the body that belongs to it.
The mask tells the person's pixels from the rest of the box.

Source: paper appendix B, which takes Grounding DINO with the prompt "person" and at most five persons a keyframe.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from stages.spec import Fail, Ok, Outcome, Row, Skip, StageConfig, StageSpec


class PeopleConfig(StageConfig):
    """Settings of the people stage."""

    detector: Literal["ssdlite", "grounding_dino", "grounding_dino_original"] = Field(
        "ssdlite",
        description="person detector; Grounding DINO by transformers or by its own code; ssdlite takes no prompt",
    )
    detector_weights: str = Field(
        "grounding_dino", description="Grounding DINO: name of `weights list` or local folder"
    )
    prompt: str = Field("person", min_length=1, description="what a detector that takes a text prompt looks for")
    max_people: int = Field(5, ge=1, description="persons kept in a keyframe, highest score first")
    min_score: float = Field(0.35, ge=0, le=1, description="score from which a detection counts")
    masks: Literal["selfie_segmentation", "sam2", "none"] = Field(
        "selfie_segmentation", description="model of the person masks; with none the whole box is the person"
    )
    mask_weights: str = Field("sam2", description="SAM 2: name of `weights list` or local folder")
    faces: Literal["centerface", "none"] = Field("centerface", description="detector of faces that no person box holds")
    min_face_score: float = Field(0.5, ge=0, le=1, description="score from which such a face adds a person")
    min_face_share: float = Field(
        0.08, ge=0, le=1, description="shorter side of such a face at least, as a part of the picture's shorter side"
    )

    @model_validator(mode="after")
    def _check_original(self) -> Self:
        if self.detector == "grounding_dino_original" and "/" not in self.detector_weights:
            raise ValueError("grounding_dino_original needs detector_weights: a folder with the .pth, its .py and BERT")
        return self

    def is_heavy(self) -> bool:
        """Grounding DINO and SAM 2 are."""
        return self.detector != "ssdlite" or self.masks == "sam2"

    def weights(self) -> tuple[str, ...]:
        """Weights of the detector, the masks and the faces."""
        detector = "ssdlite_person" if self.detector == "ssdlite" else self.detector_weights
        masks = {"selfie_segmentation": "selfie_segmentation", "sam2": self.mask_weights}.get(self.masks)
        faces = "centerface" if self.faces == "centerface" else None
        return tuple(name for name in (detector, masks, faces) if name)

    def recipe(self) -> dict[str, Any]:
        """Weights that are not used say nothing; those that are enter by what they hold, not by where they lie."""
        values = super().recipe()
        del values["detector_weights"], values["mask_weights"]
        return values


SPEC = StageSpec(
    name="people",
    version=1,
    implementation="stages.people:People",
    inputs=("keyframes",),
    output="people",
    schema=pa.schema(
        [
            ("film_id", pa.string()),
            ("frame_index", pa.int64()),
            ("person_index", pa.int32()),
            ("x0", pa.float32()),
            ("y0", pa.float32()),
            ("x1", pa.float32()),
            ("y1", pa.float32()),
            ("score", pa.float32()),
            ("source", pa.string()),
            ("mask_png", pa.binary()),
        ]
    ),
    description="boxes, scores and masks of the persons in keyframes",
)

_HELD = 0.6
"""A person box holds a face when at least this part of the face lies in it."""


class People:
    """Detects persons; see the module's first lines."""

    def __init__(self, config: PeopleConfig, weights_dir: Path | None = None) -> None:
        from models.face_detector import CenterFace

        self.config = config
        self._detector = _open_detector(config, weights_dir)
        self._masks = _open_masks(config, weights_dir)
        self._faces = CenterFace(weights_dir) if config.faces == "centerface" else None

    def __call__(self, *, keyframes: list[Row]) -> Iterator[Outcome]:
        """One outcome a keyframe: its persons, `no_person`, or a failure where its JPEG cannot be read."""
        for keyframe in keyframes:
            yield self._look_at(keyframe)

    def _look_at(self, keyframe: Row) -> Outcome:
        from models.pictures import decode_picture

        item = SPEC.item_of(keyframe)
        image = decode_picture(keyframe["jpeg"])
        if image is None:
            size = len(keyframe["jpeg"] or b"")
            return Fail(item, f"keyframe {item}: its JPEG of {size} bytes cannot be read; redo the keyframes stage")
        boxes, scores, sources = self.find(image)
        if not len(boxes):
            return Skip(item, "no_person")
        masks = self._masks.segment(image, boxes) if self._masks else [None] * len(boxes)
        people = zip(boxes, scores, sources, masks, strict=True)
        return Ok(item, [self._row(keyframe, i, *person) for i, person in enumerate(people)])

    def find(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Persons of one RGB picture, highest score first: boxes (person, 4) in pixels, scores, sources."""
        from models.regions import contained

        persons = self._detector.detect(image, self.config.min_score)
        if self._faces is None:
            best = slice(self.config.max_people)
            return persons.boxes[best], persons.scores[best], ["detector"] * len(persons.boxes[best])
        faces = self._faces.detect(image, self.config.min_face_score)
        sides = (faces.boxes[:, 2:] - faces.boxes[:, :2]).min(axis=1)
        held = (contained(faces.boxes, persons.boxes) >= _HELD).any(axis=1)
        added = ~held & (sides >= self.config.min_face_share * min(image.shape[:2]))
        bodies = body_of_face(faces.boxes[added], image.shape[1], image.shape[0])
        boxes = np.concatenate([persons.boxes, bodies])
        scores = np.concatenate([persons.scores, faces.scores[added]])
        sources = ["detector"] * len(persons.boxes) + ["face"] * len(bodies)
        order = np.argsort(-scores, kind="stable")[: self.config.max_people]
        return boxes[order], scores[order], [sources[i] for i in order]

    def _row(
        self, keyframe: Row, index: int, box: np.ndarray, score: float, source: str, mask: np.ndarray | None
    ) -> dict[str, Any]:
        x0, y0, x1, y1 = (float(side) for side in box)
        return {
            "film_id": keyframe["film_id"],
            "frame_index": keyframe["frame_index"],
            "person_index": index,
            "x0": x0,
            "y0": y0,
            "x1": x1,
            "y1": y1,
            "score": float(score),
            "source": source,
            "mask_png": None if mask is None else _encode_png(mask),
        }


def _open_detector(config: PeopleConfig, weights_dir: Path | None) -> Any:
    """What finds persons: `detect(image, min_score)`."""
    from models.weights import locate

    if config.detector == "ssdlite":
        from models.person_detector import PersonDetector

        return PersonDetector(weights_dir)
    folder = locate(config.detector_weights, weights_dir)
    if config.detector == "grounding_dino":
        from models.grounding_dino import GroundingDino

        return GroundingDino(folder, config.prompt)
    from models.grounding_dino_original import GroundingDinoOriginal

    return GroundingDinoOriginal(folder, config.prompt)


def _open_masks(config: PeopleConfig, weights_dir: Path | None) -> Any:
    """What tells persons from the rest of their boxes: `segment(image, boxes)`; None where nothing does."""
    from models.weights import locate

    if config.masks == "none":
        return None
    if config.masks == "sam2":
        from models.sam2 import Sam2

        return Sam2(locate(config.mask_weights, weights_dir))
    from models.regions import SelfieSegmentation

    return SelfieSegmentation(weights_dir)


def body_of_face(faces: np.ndarray, width: int, height: int) -> np.ndarray:
    """The box of the body that belongs to each face (face, 4), clipped to the picture.

    The proportions are those that a standing person's box has around the face: films mostly cut bodies off below.
    """
    sides = faces[:, 2:] - faces[:, :2]
    centre = (faces[:, 0] + faces[:, 2]) / 2
    x0, x1 = centre - 1.8 * sides[:, 0], centre + 1.8 * sides[:, 0]
    y0, y1 = faces[:, 1] - 0.4 * sides[:, 1], faces[:, 3] + 6 * sides[:, 1]
    boxes = np.stack([x0, y0, x1, y1], axis=1)
    return np.clip(boxes, 0, np.array([width, height] * 2)).astype(np.float32)


def _encode_png(mask: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mask, "L").save(buffer, "png")
    return buffer.getvalue()
