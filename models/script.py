"""The multimodal script of a keyframe, and the story that generation reads.

A script says who is in the picture, what the scene is like and what happens, one fact a sentence. Identifiers
("Characters:", "Person 1:") are kept apart from descriptions, because the sequence model reads the first as words
and each of the second as one embedding. A story is a list of such scripts with its characters on top.

`python -m models.script` prints the JSON schema of a story.

Source: the paper, section 3.3 "Multi-modal scripts", appendix A and B, figures 2, 14 and 15.
"""

import difflib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

MAX_CHARACTERS = 5
"""Characters of one frame (the paper, appendix A)."""
MAX_SENTENCES = 15
"""Sentences of one frame (the paper, appendix A, "ID-preserving Rendering")."""
MAX_SENTENCE_CHARS = 1000
"""About the 248 tokens that the longest text encoder reads."""
MAX_STORY_CHARACTERS = 1000
MAX_STORY_FRAMES = 100_000
MAX_STORY_BYTES = 256 * 2**20

Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_SENTENCE_CHARS)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80, pattern=r"^[^\r\n]*$")]


class ScriptError(ValueError):
    """A script or a story cannot be used; the message names the place, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a frame's sequence.

    Attributes:
        kind: `identifier`: words; `sentence`: a description, one embedding; `face`: the face of a character.
        text: The words; empty for a face.
        character: Position in `FrameScript.characters` that the piece belongs to, None outside of characters.
    """

    kind: Literal["identifier", "sentence", "face"]
    text: str = ""
    character: int | None = None


class _Closed(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Character(_Closed):
    """A character in one frame."""

    identity: Name = Field(description='The character\'s name, for example "Person 1".')
    character_index: int | None = Field(
        default=None, ge=0, description="Index among the film's characters; null where the person is not identified."
    )
    description: list[Sentence] = Field(
        default_factory=list, description="What is seen of the character in this frame, one fact a sentence."
    )


class FrameScript(_Closed):
    """The script of one keyframe: at most 5 characters and 15 sentences.

    Source: the paper, figures 2 and 14; the two limits from appendix A.
    """

    characters: list[Character] = Field(
        default_factory=list, max_length=MAX_CHARACTERS, description="Who is in the frame, the most important first."
    )
    scene_elements: list[Sentence] = Field(
        default_factory=list, description="Shot scale, light, colours and setting, one fact a sentence."
    )
    plot: list[Sentence] = Field(default_factory=list, description="What happens, one fact a sentence.")

    @model_validator(mode="after")
    def _check(self) -> "FrameScript":
        repeated = _first_repeated([character.identity for character in self.characters])
        if repeated is not None:
            raise ValueError(f"character {repeated!r} stands twice in one frame: join the two descriptions")
        count = len(self.sentences())
        if count > MAX_SENTENCES:
            raise ValueError(
                f"{count} sentences in one frame, expected at most {MAX_SENTENCES}: "
                "shorten the descriptions, scene_elements or plot, or spread them over more frames"
            )
        return self

    def sentences(self) -> list[str]:
        """All descriptions in the order of `layout`: characters', then scene elements, then plot."""
        described = [sentence for character in self.characters for sentence in character.description]
        return [*described, *self.scene_elements, *self.plot]

    def layout(self) -> list[Piece]:
        """The frame's sequence, without the start, the end and the frame tokens.

        Source: the paper, figures 2 and 14.
        """
        pieces = [Piece("identifier", "Characters:")]
        for index, character in enumerate(self.characters):
            pieces.append(Piece("identifier", f"{character.identity}:", index))
            pieces.append(Piece("face", "", index))
            pieces += [Piece("sentence", sentence, index) for sentence in character.description]
        pieces.append(Piece("identifier", "Scene Elements:"))
        pieces += [Piece("sentence", sentence) for sentence in self.scene_elements]
        pieces.append(Piece("identifier", "Plot:"))
        pieces += [Piece("sentence", sentence) for sentence in self.plot]
        return pieces

    def mirrored(self) -> "FrameScript":
        """The script of the horizontally flipped keyframe: left and right swapped in every sentence."""
        characters = [c.model_copy(update={"description": _mirror(c.description)}) for c in self.characters]
        swapped = {"scene_elements": _mirror(self.scene_elements), "plot": _mirror(self.plot)}
        return self.model_copy(update={"characters": characters, **swapped})


class StoryCharacter(_Closed):
    """A character of a story; its face comes from a picture, or from a character of an ingested film, or is free."""

    identity: Name = Field(description='The name that frames refer to, for example "Person 1".')
    description: list[Sentence] = Field(
        default_factory=list,
        max_length=MAX_SENTENCES,
        description="Used in each frame that shows the character without a description of its own.",
    )
    face: str | None = Field(
        default=None, min_length=1, description="A JPEG or PNG picture of the face, relative to the story file."
    )
    film: str | None = Field(default=None, min_length=1, description="Id of an ingested film that shows the character.")
    character_index: int | None = Field(
        default=None, ge=0, description="Which of that film's characters: 0 is the one with the most screen time."
    )

    @model_validator(mode="after")
    def _check(self) -> "StoryCharacter":
        if (self.film is None) != (self.character_index is None):
            raise ValueError("film and character_index name a film's character together: give both or neither")
        if self.face is not None and self.film is not None:
            raise ValueError("face and film each name a face: give one of them")
        return self


class StoryFrame(FrameScript):
    """One keyframe to make."""

    shot: int | None = Field(
        default=None, ge=0, description="Number of the shot that the frame belongs to; null: that of the frame before."
    )


class Story(_Closed):
    """A story: the input of generation."""

    title: str = Field(default="", max_length=200, description="Title of the movie.")
    characters: list[StoryCharacter] = Field(
        default_factory=list, max_length=MAX_STORY_CHARACTERS, description="Everybody whom frames may show."
    )
    frames: list[StoryFrame] = Field(
        min_length=1, max_length=MAX_STORY_FRAMES, description="The keyframes to make, in order."
    )

    @model_validator(mode="after")
    def _check(self) -> "Story":
        repeated = _first_repeated([character.identity for character in self.characters])
        if repeated is not None:
            raise ValueError(f"characters: {repeated!r} stands twice: give each character a name of its own")
        descriptions = self._descriptions()
        shot = 0
        for index, frame in enumerate(self.frames):
            _check_frame(index, frame, descriptions)
            if frame.shot is not None and frame.shot < shot:
                raise ValueError(
                    f"{_place(('frames', index, 'shot'))}: shot {frame.shot} comes after shot {shot}: "
                    "number the shots in the order in which they are shown"
                )
            shot = shot if frame.shot is None else frame.shot
        return self

    def _descriptions(self) -> dict[str, list[str]]:
        return {character.identity: character.description for character in self.characters}

    def completed(self) -> "Story":
        """The same story with the characters' own descriptions wherever a frame gives none."""
        descriptions = self._descriptions()
        return self.model_copy(update={"frames": [_complete(frame, descriptions) for frame in self.frames]})

    def shot_indices(self) -> list[int]:
        """The shot of each frame, starting at 0 where none is given."""
        shots: list[int] = []
        for frame in self.frames:
            shots.append(frame.shot if frame.shot is not None else shots[-1] if shots else 0)
        return shots


def name_character(character_index: int) -> str:
    """The name of a film's character in captions and scripts: 0 is "Person 1"."""
    return f"Person {character_index + 1}"


def mirror_sentence(sentence: str) -> str:
    """Swap left and right, also in words such as left-hand, leftmost and rightwards; its own inverse.

    Every "left" and "right" is taken as a direction.
    """
    return _SIDE.sub(lambda match: _OTHER_SIDE[match[1]] + match[2], sentence)


def _mirror(sentences: list[str]) -> list[str]:
    return [mirror_sentence(sentence) for sentence in sentences]


def load_story(path: str | Path) -> Story:
    """Read a story file, with descriptions completed and face pictures as absolute paths.

    Raises:
        ScriptError: The file cannot be read, is not JSON, or is not a story.
    """
    path = Path(path)
    story = parse_story(_read_text(path), source=str(path)).completed()
    characters = [_with_face(character, index, path) for index, character in enumerate(story.characters)]
    return story.model_copy(update={"characters": characters})


def parse_story(text: str, source: str = "story") -> Story:
    """Parse the JSON of a story; face pictures are not looked at.

    Raises:
        ScriptError: The text is not JSON (with line and column), or not a story.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique_object)
    except json.JSONDecodeError as error:
        raise ScriptError(f"{source}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ScriptError(f"{source}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ScriptError(f'{source}: expected one JSON object with "frames", got {_shown(data)}')
    try:
        return Story.model_validate(data, strict=True)
    except ValidationError as error:
        raise ScriptError("\n".join(f"{source}: {line}" for line in _explain(error))) from None


def story_schema() -> dict[str, Any]:
    """The JSON schema of a story."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Story.model_json_schema()}


_SIDE = re.compile(r"\b(left|right|Left|Right|LEFT|RIGHT)(most|wards?|)\b")
_SIDES = ("left", "right", "Left", "Right", "LEFT", "RIGHT")
_OTHER_SIDE = {side: _SIDES[index ^ 1] for index, side in enumerate(_SIDES)}
_PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_MAX_EXPLAINED = 5


def _first_repeated(names: list[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _check_frame(index: int, frame: StoryFrame, descriptions: dict[str, list[str]]) -> None:
    for position, character in enumerate(frame.characters):
        if character.identity not in descriptions:
            place = _place(("frames", index, "characters", position, "identity"))
            names = ", ".join(repr(name) for name in list(descriptions)[:10]) or "none"
            raise ValueError(
                f"{place}: {character.identity!r} is not among the story's characters ({names}): "
                'correct the name, or add the character to "characters" at the top of the story'
            )
    count = len(_complete(frame, descriptions).sentences())
    place = _place(("frames", index))
    if count == 0:
        raise ValueError(f"{place}: no sentence: describe at least one character, scene element or plot")
    if count > MAX_SENTENCES:
        raise ValueError(
            f"{place}: {count} sentences with the characters' own descriptions, expected at most {MAX_SENTENCES}: "
            "shorten them"
        )


def _complete(frame: StoryFrame, descriptions: dict[str, list[str]]) -> StoryFrame:
    """The frame with the story's description of each character that has none of its own in it."""
    characters = [
        c if c.description else c.model_copy(update={"description": descriptions[c.identity]}) for c in frame.characters
    ]
    return frame.model_copy(update={"characters": characters})


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_STORY_BYTES:
            raise ScriptError(f"{path}: larger than {MAX_STORY_BYTES} bytes: split the story into parts")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ScriptError(f"{path}: cannot be read ({error.strerror}): give the path of a story file") from None
    except UnicodeDecodeError as error:
        raise ScriptError(f"{path}: not UTF-8 text at byte {error.start}: save the story as UTF-8 JSON") from None


def _with_face(character: StoryCharacter, index: int, story_path: Path) -> StoryCharacter:
    if character.face is None:
        return character
    place = f"{story_path}: characters[{index}].face ({character.identity})"
    picture = story_path.parent.absolute() / character.face
    try:
        with picture.open("rb") as stream:
            start = stream.read(16)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ScriptError(
            f"{place}: picture {str(picture)!r} cannot be read ({reason}): correct the path, which is taken from "
            "the story file's folder, or remove the field"
        ) from None
    if not start.startswith(_PICTURE_STARTS):
        raise ScriptError(f"{place}: {str(picture)!r} is neither JPEG nor PNG: save the picture as one of them")
    return character.model_copy(update={"face": str(picture)})


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = _first_repeated([key for key, _ in pairs])
    if repeated is not None:
        raise ValueError(f"field {repeated!r} stands twice in one object: remove one of them")
    return dict(pairs)


def _place(location: tuple[str | int, ...]) -> str:
    """A location as a reader counts it and as JSON counts it: `frame 4 (frames[3].plot)`."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).lstrip(".")
    if len(location) >= 2 and location[0] == "frames":
        return f"frame {int(location[1]) + 1} ({path})"
    return path


def _fields_at(location: tuple[str | int, ...]) -> list[str]:
    """The fields that the object at a location may have."""
    shape = tuple(step for step in location if isinstance(step, str))
    model: type[BaseModel] = {
        ("characters",): StoryCharacter,
        ("frames",): StoryFrame,
        ("frames", "characters"): Character,
    }.get(shape, Story)
    return list(model.model_fields)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _explain(error: ValidationError) -> list[str]:
    """One line for each of the first problems: place, value, what was expected, remedy."""
    problems = error.errors(include_url=False)
    rest = len(problems) - _MAX_EXPLAINED
    lines = [_explain_problem(dict(problem)) for problem in problems[:_MAX_EXPLAINED]]
    return [*lines, f"and {rest} more problems"] if rest > 0 else lines


def _explain_problem(problem: dict[str, Any]) -> str:
    location, kind, value = problem["loc"], problem["type"], problem["input"]
    context = problem.get("ctx", {})
    prefix = f"{_place(location)}: " if location else ""
    if kind == "extra_forbidden":
        allowed = _fields_at(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "remove it"
        return f"{prefix}unknown field {location[-1]!r}: {remedy} Known fields here: {', '.join(allowed)}"
    if kind == "missing":
        return f"{prefix}missing: add the field {location[-1]!r}"
    if kind == "too_long" and location[-1] == "characters" and location[0] == "frames":
        return (
            f"{prefix}{context['actual_length']} characters in one frame, expected at most {context['max_length']}: "
            "keep the most important ones, or show the others in another frame"
        )
    if kind == "too_long":
        return f"{prefix}{len(value)} entries, expected at most {context['max_length']}: shorten the list"
    if kind == "too_short":
        return f"{prefix}the list is empty: add at least {context['min_length']} entry"
    if kind == "string_too_short":
        return f"{prefix}blank text {_shown(value)}: write something or remove the entry"
    if kind == "string_too_long":
        return f"{prefix}{len(value)} letters, expected at most {context['max_length']}: split or shorten the text"
    if kind == "value_error":
        return f"{prefix}{context['error']}"
    return f"{prefix}{problem['msg'].replace('Input', 'the value', 1)}, got {_shown(value)}"


if __name__ == "__main__":
    print(json.dumps(story_schema(), indent=2))
