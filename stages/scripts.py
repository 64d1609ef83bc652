"""Scripts: the captions of a keyframe and of its persons fused into characters, scene elements and plot.

The paper asks a large language model for it (appendix B, figures 14 and 15): that is `llm`. `rules` sorts the captions'
sentences by their words and writes none of its own. Beside each sentence of a script stand the captions that it goes
back to, counted from 1 over all sentences of the keyframe's captions, and beside the script how many of its sentences
no caption bears out.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
from pydantic import Field

from models.script import MAX_CHARACTERS, MAX_SENTENCES, Character, FrameScript, name_character
from stages.chat import ChatConfig, load_prompts, open_chat_model
from stages.spec import Fail, Ok, Outcome, Row, StageSpec

if TYPE_CHECKING:
    from models.script_writer import FrameCaptions, WrittenScript

PROMPTS = ("system", "fuse", "extract", "script", "repair")


class ScriptsConfig(ChatConfig):
    """Settings of the scripts."""

    fuser: Literal["rules", "llm"] = Field(
        "rules", description="What fuses the captions: rules that sort their sentences, or a language model."
    )
    max_characters: int = Field(MAX_CHARACTERS, ge=1, le=MAX_CHARACTERS, description="Characters of a keyframe.")
    max_sentences: int = Field(
        MAX_SENTENCES, ge=MAX_CHARACTERS, le=MAX_SENTENCES, description="Sentences of a keyframe, all parts together."
    )

    def asks_model(self) -> bool:
        """Rules need none."""
        return self.fuser == "llm"

    def prompt_names(self) -> tuple[str, ...]:
        """Of the three steps."""
        return PROMPTS


SPEC = StageSpec(
    name="scripts",
    version=3,
    implementation="stages.scripts:Scripts",
    inputs=("keyframes", "captions"),
    output="scripts",
    schema=pa.schema(
        [
            ("film_id", pa.string()),
            ("frame_index", pa.int64()),
            ("time_s", pa.float64()),
            ("shot_index", pa.int32()),
            ("script", pa.string()),
            ("captions", pa.list_(pa.list_(pa.int32()))),
            ("untraced", pa.int32()),
        ]
    ),
    description="captions fused into characters, scene elements and plot",
)


class Scripts:
    """Writes the script of each keyframe; see the module's text."""

    def __init__(self, config: ScriptsConfig, weights_dir: Path | None = None) -> None:
        self.config = config
        self._model = open_chat_model(config, weights_dir) if config.asks_model() else None

    def __call__(self, *, keyframes: list[Row], captions: list[Row]) -> Iterator[Outcome]:
        """Yield one outcome for each keyframe.

        Raises:
            ChatError: The model answers nothing.
        """
        captions_of: dict[int, list[Row]] = {}
        for row in captions:
            captions_of.setdefault(row["frame_index"], []).append(row)
        written = self._ask(keyframes, captions_of) if self.config.asks_model() else {}
        for keyframe in keyframes:
            item = SPEC.item_of(keyframe)
            rows = captions_of.get(keyframe["frame_index"], [])
            place = f"film {keyframe['film_id']}, keyframe {item}"
            if not rows:
                yield Fail(item, f"{place}: it has no caption: redo its captions")
            elif not self.config.asks_model():
                script = fuse_captions(rows, self.config.max_characters, self.config.max_sentences)
                yield Ok(item, [_row(keyframe, script, find_captions(script, rows), 0)])
            elif written[item].script is None:
                yield Fail(item, f"{place}: {written[item].error}", written[item].retryable)
            else:
                found = written[item]
                yield Ok(item, [_row(keyframe, found.script, found.captions, found.untraced)])

    def _ask(self, keyframes: list[Row], captions_of: dict[int, list[Row]]) -> "dict[str, WrittenScript]":
        from models.script_writer import Prompts, write_scripts

        frames = [
            join_captions(SPEC.item_of(keyframe), captions_of[keyframe["frame_index"]], self.config.max_characters)
            for keyframe in keyframes
            if keyframe["frame_index"] in captions_of
        ]
        prompts = Prompts(**load_prompts(self.config.prompts, PROMPTS))
        return write_scripts(self._model, frames, prompts, self.config.max_sentences, self.config.max_tokens)


def _row(keyframe: Row, script: FrameScript, captions: Sequence[Sequence[int]], untraced: int) -> Row:
    kept = {name: keyframe[name] for name in ("film_id", "frame_index", "time_s", "shot_index")}
    traced = {"captions": [list(numbers) for numbers in captions], "untraced": untraced}
    return kept | {"script": script.model_dump_json()} | traced


def find_captions(script: FrameScript, captions: list[Row]) -> list[list[int]]:
    """For each sentence of a script, which of the captions' sentences, from 1, say just that."""
    said = [sentence for row in captions for sentence in row["sentences"]]
    return [[i for i, text in enumerate(said, 1) if text == sentence] for sentence in script.sentences()]


def join_captions(item: str, captions: list[Row], max_characters: int) -> "FrameCaptions":
    """What a language model is told of a keyframe: its captions, and its characters as `fuse_captions` orders them."""
    from models.script_writer import FrameCaptions

    persons = sorted((row for row in captions if row["target"] == "person" and row["sentences"]), key=_rank)
    persons = persons[:max_characters]
    names = {row["person_index"]: name for row, name in zip(persons, _name_persons(persons), strict=True)}
    sentences = [
        ("frame" if row["target"] == "keyframe" else names.get(row["person_index"], "somebody else"), sentence)
        for row in captions
        for sentence in row["sentences"]
    ]
    characters = [(names[row["person_index"]], row["character_index"]) for row in persons]
    return FrameCaptions(item, tuple(sentences), tuple(characters))


# Words of sentences that say where somebody is, what somebody does, or what changes.
_PLOT = re.compile(
    r"\b(is (far )?on the (left|right)|is in the centre|to the (left|right)( of)?|faces the camera|turned|tilted"
    r"|moves|changes|still|begins)\b"
)


def is_plot(sentence: str) -> bool:
    """Whether a sentence tells of place, direction or motion; the others describe looks."""
    return _PLOT.search(sentence) is not None


def fuse_captions(captions: list[Row], max_characters: int, max_sentences: int) -> FrameScript:
    """Sort the sentences of one keyframe's captions into a script.

    Identified characters come first, by character_index, then the others by person_index. Sentences about place,
    direction and motion go to the plot; a character without any other sentence keeps its first. Where there are too
    many, the parts take turns, each giving its first sentences.
    """
    persons = [row for row in captions if row["target"] == "person" and row["sentences"]]
    persons = sorted(persons, key=_rank)[:max_characters]
    scene: list[str] = []
    plot: list[str] = []
    descriptions: list[list[str]] = []
    for row in captions:
        if row["target"] == "keyframe":
            _sort(row["sentences"], scene, plot)
    for row in persons:
        looks: list[str] = []
        acts: list[str] = []
        _sort(row["sentences"], looks, acts)
        descriptions.append(looks or [acts.pop(0)])
        plot += acts
    *kept, kept_scene, kept_plot = _share_out([*descriptions, scene, plot], max_sentences)
    names = _name_persons(persons)
    return FrameScript(
        characters=[
            Character(identity=name, character_index=row["character_index"], description=description)
            for name, row, description in zip(names, persons, kept, strict=True)
        ],
        scene_elements=kept_scene,
        plot=kept_plot,
    )


def _rank(row: Row) -> tuple[bool, int, int]:
    character = row["character_index"]
    return character is None, -1 if character is None else character, row["person_index"]


def _sort(sentences: list[str], looks: list[str], acts: list[str]) -> None:
    for sentence in sentences:
        (acts if is_plot(sentence) else looks).append(sentence)


def _share_out(parts: list[list[str]], budget: int) -> list[list[str]]:
    """The first sentences of each part, in turns, until the budget is spent."""
    counts = [0] * len(parts)
    for turn in range(max(len(part) for part in parts)):
        for index, part in enumerate(parts):
            if turn < len(part) and sum(counts) < budget:
                counts[index] += 1
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _name_persons(persons: list[Row]) -> list[str]:
    """Identities: "Person 3" of the film, or "Unidentified person", numbered where there are several."""
    names = []
    unknown = [row["person_index"] for row in persons if row["character_index"] is None]
    for row in persons:
        if row["character_index"] is not None:
            names.append(name_character(row["character_index"]))
        else:
            number = unknown.index(row["person_index"]) + 1
            names.append("Unidentified person" if len(unknown) == 1 else f"Unidentified person {number}")
    return names
