"""Captions: sentences about each keyframe and about each person in it, one fact a sentence.

The paper asks a vision-language model for them (appendix B, figure 14). `rules` writes them from what was measured:
shot scale, count and place of people, direction of faces, light, colours of scene and clothing, motion. It names
nothing else, and the same measurements always give the same sentences.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.spec import Fail, Ok, Outcome, Row, StageConfig, StageSpec

if TYPE_CHECKING:
    from models.scene import Face, Person


class CaptionsConfig(StageConfig):
    """Settings of the captions."""

    captioner: Literal["rules"] = Field("rules", description="What writes the sentences: rules over measurements.")
    max_sentences: int = Field(12, ge=1, le=15, description="Sentences of a keyframe, the most telling first.")
    max_person_sentences: int = Field(6, ge=1, le=15, description="Sentences of a person, the most telling first.")


SPEC = StageSpec(
    name="captions",
    version=2,
    implementation="stages.captions:Captions",
    inputs=("keyframes", "people", "faces", "identities"),
    output="captions",
    schema=pa.schema(
        [
            ("film_id", pa.string()),
            ("frame_index", pa.int64()),
            ("target", pa.string()),
            ("person_index", pa.int32()),
            ("character_index", pa.int32()),
            ("sentences", pa.list_(pa.string())),
            ("captioner", pa.string()),
        ]
    ),
    description="one fact a sentence, for each keyframe and each person in it",
)


class Captions:
    """Captions keyframes; see the module's text."""

    def __init__(self, config: CaptionsConfig, weights_dir: Path | None = None) -> None:
        self.config = config

    def __call__(
        self, *, keyframes: list[Row], people: list[Row], faces: list[Row], identities: list[Row]
    ) -> Iterator[Outcome]:
        """Yield one outcome for each keyframe, also for those without people."""
        people_of, faces_of, identities_of = (_group(rows) for rows in (people, faces, identities))
        for keyframe in keyframes:
            item, frame = SPEC.item_of(keyframe), keyframe["frame_index"]
            try:
                rows = self._caption(
                    keyframe, people_of.get(frame, []), faces_of.get(frame, []), identities_of.get(frame, [])
                )
            except ValueError as error:
                yield Fail(item, f"film {keyframe['film_id']}, keyframe {item}: {error}")
            else:
                yield Ok(item, rows)

    def _caption(self, keyframe: Row, people: list[Row], faces: list[Row], identities: list[Row]) -> list[Row]:
        from models.rule_captioner import CAPTIONER, caption_keyframe, caption_person
        from models.scene import measure_scene

        image = _decode(keyframe["jpeg"], "picture", color=True)
        characters = choose_characters(faces, identities)
        persons = [_person(row, faces, characters) for row in people]
        other_faces = [_face(face) for face in faces if face["person_index"] is None]
        scene = measure_scene(image, persons)
        shared = {"film_id": keyframe["film_id"], "frame_index": keyframe["frame_index"], "captioner": CAPTIONER}
        limit = self.config.max_sentences
        sentences = caption_keyframe(scene, persons, keyframe["motion"], limit, other_faces)
        rows = [shared | {"target": "keyframe", "person_index": None, "character_index": None, "sentences": sentences}]
        for row, person in zip(people, persons, strict=True):
            index = row["person_index"]
            rows.append(
                shared
                | {
                    "target": "person",
                    "person_index": index,
                    "character_index": characters.get(index),
                    "sentences": caption_person(image, scene, person, self.config.max_person_sentences),
                }
            )
        return rows


def choose_characters(faces: list[Row], identities: list[Row]) -> dict[int, int]:
    """Which character each person of a keyframe is: person_index to character_index.

    A person whose face belongs to no character is left out. Where two persons look like the same character, the one
    closer to the character keeps it.
    """
    person_of = {face["face_index"]: face["person_index"] for face in faces}
    chosen: dict[int, int] = {}
    for identity in sorted(identities, key=lambda row: (_distance(row), row["face_index"])):
        person, character = person_of.get(identity["face_index"]), identity["character_index"]
        if person is not None and character is not None and person not in chosen and character not in chosen.values():
            chosen[person] = character
    return chosen


def _distance(identity: Row) -> float:
    return float("inf") if identity["distance"] is None else identity["distance"]


def _group(rows: list[Row]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["frame_index"], []).append(row)
    return groups


def _person(row: Row, faces: list[Row], characters: dict[int, int]) -> "Person":
    from models.scene import Person
    from models.script import name_character

    index = row["person_index"]
    best = max((face for face in faces if face["person_index"] == index), key=lambda face: face["score"], default=None)
    return Person(
        name=name_character(characters[index]) if index in characters else None,
        box=(row["x0"], row["y0"], row["x1"], row["y1"]),
        mask=_decode(row["mask_png"], f"mask of person {index}", color=False),
        face=_face(best) if best is not None else None,
    )


def _face(row: Row) -> "Face":
    from models.scene import Face

    landmarks = np.array(row["landmarks"], np.float32).reshape(5, 2)
    return Face((row["x0"], row["y0"], row["x1"], row["y1"]), landmarks)


def _decode(data: bytes, what: str, color: bool) -> np.ndarray:
    """RGB uint8 (height, width, 3), or uint8 (height, width) without colour."""
    import cv2

    flags = cv2.IMREAD_COLOR_RGB if color else cv2.IMREAD_GRAYSCALE
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if image is None:
        raise ValueError(f"the {what} ({len(data)} bytes) cannot be decoded: redo the stage that wrote it")
    return image
