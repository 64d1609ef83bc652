"""Scripts by a language model, in the paper's steps, with the captions that each sentence goes back to.

The captions of a keyframe and of its characters are joined into a description; scene elements and plot are taken from
it; then the structured script is written, and names for each of its sentences the captions that say so.

Source: the paper, appendix B, figure 15 (steps 1 and 2: fuse, step 3: extract, then reformat). The references to
captions are ours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.chat import ChatAnswer, ChatModel, ChatRequest
from models.chat_captioner import parse_json_object
from models.script import MAX_CHARACTERS, Character, FrameScript, Name, Sentence

Kind = TypeVar("Kind", bound=BaseModel)

MIN_SHARED_WORDS = 0.5
"""Share of a sentence's telling words that the captions it names have to hold."""
_STOP_WORDS = set(
    re.findall(
        r"\w+",
        "a an and are as at be by for from has have in into is it its of on or that the their there they this to was "
        "which while who with",
    )
)


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TracedSentence(_Closed):
    """A sentence, and the numbers of the captions that say so."""

    text: Sentence
    captions: list[int] = Field(default_factory=list)


class TracedCharacter(_Closed):
    """A character of a script as the model writes it."""

    identity: Name
    description: list[TracedSentence]


class TracedScript(_Closed):
    """A script as the model writes it."""

    characters: list[TracedCharacter] = Field(max_length=MAX_CHARACTERS)
    scene_elements: list[TracedSentence]
    plot: list[TracedSentence]

    def sentences(self) -> list[TracedSentence]:
        """In the order of `FrameScript.sentences`."""
        described = [sentence for character in self.characters for sentence in character.description]
        return [*described, *self.scene_elements, *self.plot]


class _Described(_Closed):
    description: str = Field(min_length=1)


class _Extracted(_Closed):
    scene_elements: list[Sentence]
    plot: list[Sentence]


@dataclass(frozen=True)
class FrameCaptions:
    """What is known of a keyframe before its script is written.

    Attributes:
        key: What it is called outside.
        sentences: Of all its captions, with what each is about: "frame", or a character's name.
        characters: Name and `character_index` of each character, the most important first.
    """

    key: str
    sentences: tuple[tuple[str, str], ...]
    characters: tuple[tuple[str, int | None], ...]

    def numbered(self) -> str:
        """The captions as the model reads them, from 1."""
        return "\n".join(f"[{i}] ({about}) {text}" for i, (about, text) in enumerate(self.sentences, 1))

    def names(self) -> str:
        """The characters as the model reads them."""
        return ", ".join(name for name, _ in self.characters) or "none"


@dataclass(frozen=True)
class Prompts:
    """What is asked in each step, and again after an answer that cannot be used."""

    system: str
    fuse: str
    extract: str
    script: str
    repair: str


@dataclass(frozen=True)
class WrittenScript:
    """A script, or why there is none.

    Attributes:
        script: The script.
        captions: For each of its sentences the numbers of the captions, from 1, that it goes back to.
        untraced: How many sentences go back to none.
    """

    script: FrameScript | None = None
    captions: tuple[tuple[int, ...], ...] = ()
    untraced: int = 0
    error: str = ""
    retryable: bool = False


def write_scripts(
    model: ChatModel, frames: Sequence[FrameCaptions], prompts: Prompts, max_sentences: int, max_tokens: int = 2048
) -> dict[str, WrittenScript]:
    """Write the scripts of keyframes, each step for all of them at once.

    An answer that does not fit its schema is asked for once more, with what is wrong with it.

    Args:
        model: Answers.
        frames: The keyframes; their keys differ.
        prompts: What is asked.
        max_sentences: Of one script.
        max_tokens: Longest answer.

    Returns:
        Key to script, for each keyframe.

    Raises:
        ChatError: No request can be answered.
    """
    walk = _Walk(model, prompts, max_sentences, max_tokens, {frame.key: frame for frame in frames})
    described = walk.step(_Described, {f.key: _fill(prompts.fuse, f) for f in frames})
    asked = {key: _fill(prompts.extract, walk.frames[key], description=d.description) for key, d in described.items()}
    extracted = walk.step(_Extracted, asked)
    asked = {
        key: _fill(
            prompts.script, walk.frames[key], sentences=str(max_sentences),
            scene_elements=_listed(found.scene_elements), plot=_listed(found.plot),
        )
        for key, found in extracted.items()
    }  # fmt: skip
    written = walk.step(TracedScript, asked)
    return {key: walk.failed.get(key) or _trace(walk.frames[key], written[key]) for key in walk.frames}


@dataclass
class _Walk:
    """The steps over all keyframes; those that failed are left out of what follows."""

    model: ChatModel
    prompts: Prompts
    max_sentences: int
    max_tokens: int
    frames: dict[str, FrameCaptions]

    def __post_init__(self) -> None:
        self.failed: dict[str, WrittenScript] = {}

    def step(self, kind: type[Kind], questions: dict[str, str]) -> dict[str, Kind]:
        """Ask all questions of a step; ask once more where an answer cannot be used."""
        found: dict[str, Kind] = {}
        again: dict[str, str] = {}
        for key, answer, _ in self._ask(kind, questions):
            try:
                found |= self._read(kind, key, answer)
            except ValueError as problem:
                question = questions[key]
                again[key] = self.prompts.repair.format(question=question, answer=answer.text, problem=problem)
        for key, answer, request in self._ask(kind, again):
            try:
                found |= self._read(kind, key, answer)
            except ValueError as problem:
                self.model.forget([request, replace(request, text=questions[key])])
                told = f"the model answered twice what cannot be used: {problem}"
                self.failed[key] = WrittenScript(error=told)
        return found

    def _ask(self, kind: type[BaseModel], questions: dict[str, str]) -> list[tuple[str, ChatAnswer, ChatRequest]]:
        schema = _plain_schema(kind)
        requests = [
            ChatRequest(key, text, self.prompts.system, schema=schema, max_tokens=self.max_tokens)
            for key, text in questions.items()
        ]
        return list(zip(questions, self.model.ask(requests), requests, strict=True))

    def _read(self, kind: type[Kind], key: str, answer: ChatAnswer) -> dict[str, Kind]:
        """The answer of one keyframe, if there is one.

        Raises:
            ValueError: It cannot be used; says why.
        """
        if answer.text is None:
            self.failed[key] = WrittenScript(error=answer.error, retryable=answer.retryable)
            return {}
        try:
            value = kind.model_validate(parse_json_object(answer.text))
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()[:3]]
            raise ValueError("; ".join(problems)) from None
        value.model_dump_json().encode()  # half of a letter is a ValueError here
        if isinstance(value, TracedScript):
            _check_script(self.frames[key], value, self.max_sentences)
        return {key: value}


def _fill(prompt: str, frame: FrameCaptions, **values: str) -> str:
    return prompt.format(captions=frame.numbered(), characters=frame.names(), **values)


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences) or "- none"


def _check_script(frame: FrameCaptions, written: TracedScript, max_sentences: int) -> None:
    """Refuse a script whose characters are not the frame's, or that is empty or too long.

    Raises:
        ValueError: Says what is wrong.
    """
    names = [character.identity for character in written.characters]
    expected = [name for name, _ in frame.characters]
    if sorted(names) != sorted(expected):
        raise ValueError(f"its characters are {', '.join(names) or 'none'}, expected {', '.join(expected) or 'none'}")
    count = len(written.sentences())
    if not 1 <= count <= max_sentences:
        raise ValueError(f"it has {count} sentences, expected 1 to {max_sentences}")
    unknown = sorted({n for s in written.sentences() for n in s.captions if not 1 <= n <= len(frame.sentences)})
    if unknown:
        raise ValueError(f"it names caption {unknown[0]}, there are {len(frame.sentences)}")


def _trace(frame: FrameCaptions, written: TracedScript) -> WrittenScript:
    """The script in the order of the frame's characters, and how much of it the captions bear out."""
    by_name = {character.identity: character for character in written.characters}
    ordered = written.model_copy(update={"characters": [by_name[name] for name, _ in frame.characters]})
    script = FrameScript(
        characters=[
            Character(identity=name, character_index=index, description=[s.text for s in by_name[name].description])
            for name, index in frame.characters
        ],
        scene_elements=[s.text for s in written.scene_elements],
        plot=[s.text for s in written.plot],
    )
    said = [text for _, text in frame.sentences]
    named = [tuple(dict.fromkeys(sentence.captions)) for sentence in ordered.sentences()]
    untraced = sum(
        not is_traced(sentence.text, [said[number - 1] for number in numbers])
        for sentence, numbers in zip(ordered.sentences(), named, strict=True)
    )
    return WrittenScript(script, tuple(named), untraced)


def is_traced(sentence: str, captions: Sequence[str]) -> bool:
    """Whether captions bear a sentence out: they hold at least half of its telling words, by their stems."""
    words = _stems(sentence)
    return bool(words) and len(words & _stems(" ".join(captions))) >= MIN_SHARED_WORDS * len(words)


def _stems(text: str) -> set[str]:
    """Telling words without their commonest endings."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {re.sub(r"(ing|ed|es|s)$", "", word) if len(word) > 4 else word for word in words if word not in _STOP_WORDS}


def _plain_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema in the words that all servers know: no references, titles or limits on texts."""
    schema = kind.model_json_schema()
    return _without_references(schema, schema.get("$defs", {}))


def _without_references(part: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(part, list):
        return [_without_references(value, definitions) for value in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _without_references(definitions[part["$ref"].rpartition("/")[2]], definitions)
    dropped = {"$defs", "title", "description", "default", "minLength", "maxLength", "pattern"}
    kept = {}
    for name, value in part.items():
        if name == "properties":  # names here are fields, of which one may be called `description`
            kept[name] = {field: _without_references(schema, definitions) for field, schema in value.items()}
        elif name not in dropped:
            kept[name] = _without_references(value, definitions)
    if kept.get("type") == "object":
        kept["required"] = list(kept.get("properties", {}))  # strict servers ask for all
    return kept
