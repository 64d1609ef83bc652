"""Captions: sentences about each keyframe and about each person in it, one fact a sentence.

The paper asks a vision-language model for them (appendix B, figure 14), for the keyframe and for each person cut out
of it: that is `vlm`. `rules` writes them from what was measured: shot scale, count and place of people, direction of
faces, light, colours of scene and clothing, motion. It names nothing else, and the same measurements always give the
same sentences.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.chat import ChatConfig, load_prompts, open_chat_model
from stages.errors import ComputationError
from stages.spec import Fail, Ok, Outcome, Row, StageSpec

if TYPE_CHECKING:
    from models.chat_captioner import Caption
    from models.clip import Clip
    from models.scene import Face, Person

PROMPTS = ("system", "keyframe", "person", "repair")


class CaptionsConfig(ChatConfig):
    """Settings of the captions."""

    captioner: Literal["rules", "vlm"] = Field(
        "rules", description="What writes the sentences: rules over measurements, or a vision-language model."
    )
    max_sentences: int = Field(12, ge=1, le=15, description="Sentences of a keyframe, the most telling first.")
    max_person_sentences: int = Field(6, ge=1, le=15, description="Sentences of a person, the most telling first.")
    pictures_per_request: int = Field(1, ge=1, description="Pictures that the model is asked about at once.")
    sentinels: int = Field(
        1,
        ge=0,
        description="Plain pictures among those of a unit, whose colour the model has to name, or nothing of the unit "
        "is kept; one in each question that holds several pictures.",
    )
    check_weights: str | None = Field(
        None,
        description="CLIP, which has to find that a model's captions fit their own keyframes: name of `weights list` "
        "or local folder; none for no check",
        json_schema_extra={"neutral": True},
    )

    def weights(self) -> tuple[str, ...]:
        """The model, where it runs here, and what checks it."""
        checks = (self.check_weights,) if self.asks_model() and self.check_weights else ()
        return (*super().weights(), *checks)

    def recipe_weights(self) -> tuple[str, ...]:
        """A check changes no caption."""
        return super().weights()

    def asks_model(self) -> bool:
        """Rules need none."""
        return self.captioner == "vlm"

    def prompt_names(self) -> tuple[str, ...]:
        """For keyframes and for persons."""
        return PROMPTS

    def recipe(self) -> dict[str, Any]:
        """What a model is asked about at once says nothing of rules."""
        values = super().recipe()
        if not self.asks_model():
            del values["pictures_per_request"], values["sentinels"]
        return values


SPEC = StageSpec(
    name="captions",
    version=3,
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
        self._model = open_chat_model(config, weights_dir) if config.asks_model() else None
        self._clip = _open_check(config, weights_dir)

    def __call__(
        self, *, keyframes: list[Row], people: list[Row], faces: list[Row], identities: list[Row]
    ) -> Iterator[Outcome]:
        """Yield one outcome for each keyframe, also for those without people.

        Raises:
            ComputationError: Answers of a model stand beside the wrong pictures.
            ChatError: The model answers nothing.
        """
        if self.config.asks_model():
            return self._ask(keyframes, people, faces, identities)
        return self._measure(keyframes, people, faces, identities)

    def _ask(
        self, keyframes: list[Row], people: list[Row], faces: list[Row], identities: list[Row]
    ) -> Iterator[Outcome]:
        """All pictures of the unit go to the model together; a keyframe fails where one of its pictures did."""
        from models.chat_captioner import AlignmentError, Prompts, Subject, caption_pictures

        config, people_of = self.config, _group(people)
        words = load_prompts(config.prompts, PROMPTS)
        frames, persons, broken = self._cut(keyframes, people_of)
        captions: dict[str, Caption] = {}
        try:
            for subjects, question, limit in (
                (frames, words["keyframe"], config.max_sentences),
                (persons, words["person"], config.max_person_sentences),
            ):
                prompts = Prompts(words["system"], question, words["repair"])
                asked = [Subject(key, jpeg) for key, jpeg in subjects.items()]
                check = self._check_of(frames) if subjects is frames else lambda captions: None
                options = (config.pictures_per_request, config.sentinels, config.max_tokens, check)
                captions |= caption_pictures(self._model, asked, prompts, limit, *options)
        except AlignmentError as error:
            raise ComputationError(f"captions of {keyframes[0]['film_id']}: {error}") from None
        faces_of, identities_of = _group(faces), _group(identities)
        for keyframe in keyframes:
            item, frame = SPEC.item_of(keyframe), keyframe["frame_index"]
            characters = choose_characters(faces_of.get(frame, []), identities_of.get(frame, []))
            yield self._outcome(keyframe, people_of.get(frame, []), characters, captions, broken.get(item))

    def _check_of(self, frames: dict[str, bytes]) -> "Callable[[dict[str, Caption]], None]":
        """Lets CLIP look whether keyframes and captions belong together; raises an `AlignmentError` where not."""
        from models.chat_captioner import check_fit

        def check(captions: "dict[str, Caption]") -> None:
            items = [item for item in frames if captions[item].sentences]
            if self._clip is None or not items:
                return
            pictures = self._clip.embed_pictures([_decode(frames[item], "picture", color=True) for item in items])
            texts = self._clip.embed_texts([" ".join(captions[item].sentences) for item in items])
            check_fit(pictures, texts)

        return check

    def _cut(
        self, keyframes: list[Row], people_of: dict[int, list[Row]]
    ) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, str]]:
        """Key to JPEG of the keyframes and of the persons in them; item to error of keyframes that cannot be read."""
        from models.chat_captioner import cut_out, encode_jpeg

        frames, persons, broken = {}, {}, {}
        for keyframe in keyframes:
            item = SPEC.item_of(keyframe)
            try:
                image = _decode(keyframe["jpeg"], "picture", color=True)
                for row in people_of.get(keyframe["frame_index"], []):
                    mask = row["mask_png"] and _decode(row["mask_png"], "mask", color=False)
                    persons[_person_key(item, row)] = encode_jpeg(cut_out(image, row, mask))
                frames[item] = keyframe["jpeg"]
            except ValueError as error:
                broken[item] = str(error)
        return frames, persons, broken

    def _outcome(
        self,
        keyframe: Row,
        people: list[Row],
        characters: dict[int, int],
        captions: "dict[str, Caption]",
        broken: str | None,
    ) -> Outcome:
        item = SPEC.item_of(keyframe)
        place = f"film {keyframe['film_id']}, keyframe {item}"
        if broken:
            return Fail(item, f"{place}: {broken}")
        keys = [item, *(_person_key(item, row) for row in people)]
        if failed := next((key for key in keys if captions[key].error), None):
            return Fail(item, f"{place}, picture {failed}: {captions[failed].error}", captions[failed].retryable)
        shared = {"film_id": keyframe["film_id"], "frame_index": keyframe["frame_index"]}
        shared["captioner"] = f"vlm {self.config.model}" if self.config.endpoint_url else "vlm"
        rows = [shared | _about("keyframe", None, None, captions[item].sentences)]
        for row in people:
            index = row["person_index"]
            sentences = captions[_person_key(item, row)].sentences
            rows.append(shared | _about("person", index, characters.get(index), sentences))
        return Ok(item, rows)

    def _measure(
        self, keyframes: list[Row], people: list[Row], faces: list[Row], identities: list[Row]
    ) -> Iterator[Outcome]:
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
        rows = [shared | _about("keyframe", None, None, sentences)]
        for row, person in zip(people, persons, strict=True):
            index = row["person_index"]
            sentences = caption_person(image, scene, person, self.config.max_person_sentences)
            rows.append(shared | _about("person", index, characters.get(index), sentences))
        return rows


def _open_check(config: CaptionsConfig, weights_dir: Path | None) -> "Clip | None":
    if not config.asks_model() or config.check_weights is None:
        return None
    from models.clip import Clip
    from models.weights import locate

    return Clip(locate(config.check_weights, weights_dir))


def _about(target: str, person_index: int | None, character_index: int | None, sentences: Sequence[str]) -> Row:
    about = {"target": target, "person_index": person_index, "character_index": character_index}
    return about | {"sentences": list(sentences)}


def _person_key(item: str, person: Row) -> str:
    return f"{item}-{person['person_index']}"


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
        mask=_decode(row["mask_png"], f"mask of person {index}", color=False) if row["mask_png"] else _whole_box(row),
        face=_face(best) if best is not None else None,
    )


def _whole_box(person: Row) -> np.ndarray:
    """The mask of a person of whom only the box is known."""
    x0, y0 = int(np.floor(person["x0"])), int(np.floor(person["y0"]))
    return np.full((int(np.ceil(person["y1"])) - y0, int(np.ceil(person["x1"])) - x0), 255, np.uint8)


def _face(row: Row) -> "Face":
    from models.scene import Face

    landmarks = np.array(row["landmarks"], np.float32).reshape(5, 2)
    return Face((row["x0"], row["y0"], row["x1"], row["y1"]), landmarks)


def _decode(data: bytes, what: str, color: bool) -> np.ndarray:
    """RGB uint8 (height, width, 3), or uint8 (height, width) without colour."""
    from models.pictures import decode_gray, decode_picture

    image = decode_picture(data) if color else decode_gray(data)
    if image is None:
        raise ValueError(f"the {what} ({len(data)} bytes) cannot be decoded: redo the stage that wrote it")
    return image
