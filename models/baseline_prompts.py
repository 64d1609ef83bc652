"""The text that the baselines paint a story's frames from: scripts, within the 77 positions that CLIP reads.

A script has up to 15 sentences, which is more than CLIP's text encoders take. What has no room is left out sentence by
sentence, never in the middle of one unless not even the first fits, and is told.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from models.script import FrameScript, Story

TOKENS = 75
"""Of CLIP's 77 positions, without the start and the end."""


@dataclass(frozen=True)
class Prompt:
    """What a text encoder reads of a frame.

    Attributes:
        text: At most 75 tokens.
        left_out: Sentences, or the end of one, that had no room.
    """

    text: str
    left_out: tuple[str, ...] = ()


def write_prompts(story: Story, count: Callable[[str], int], characters_first: bool = False) -> list[Prompt]:
    """One prompt a frame.

    Args:
        story: With its characters' descriptions filled in (`Story.completed`).
        count: Tokens of a text, without the encoder's start and end.
        characters_first: Descriptions of the characters lead, in up to half of the room, as StoryDiffusion writes its
            prompts; otherwise what happens leads, then the characters and the scene follow.
    """
    return [_write_prompt(frame, count, characters_first) for frame in story.frames]


def _write_prompt(script: FrameScript, count: Callable[[str], int], characters_first: bool) -> Prompt:
    characters = [sentence for c in script.characters for sentence in c.description or [c.identity]]
    leading: list[str] = []
    if characters_first:
        leading, characters = _fit(characters, TOKENS // 2, count)
        rest = [*script.plot, *script.scene_elements, *characters]
    else:
        rest = [*script.plot, *characters, *script.scene_elements]
    following, left_out = _fit(rest, TOKENS - sum(map(count, leading)), count)
    if not leading and not following:
        return _shorten(left_out, count)
    return Prompt(" ".join([*leading, *following]), tuple(left_out))


def _fit(sentences: Iterable[str], room: int, count: Callable[[str], int]) -> tuple[list[str], list[str]]:
    """The sentences that find room, in order, and the others."""
    kept, left_out = [], []
    for sentence in sentences:
        needed = count(sentence)
        (kept if needed <= room else left_out).append(sentence)
        room -= needed if needed <= room else 0
    return kept, left_out


def _shorten(sentences: list[str], count: Callable[[str], int]) -> Prompt:
    """The first words of the first sentence, where not even one sentence fits; of a longer word, its first characters.

    A language without spaces writes a sentence as one word.
    """
    words, end = sentences[0].split(), []
    while len(words) > 1 and count(" ".join(words)) > TOKENS:
        end.insert(0, words.pop())
    text = " ".join(words)
    size = len(text)
    while size > 1 and count(text[:size]) > TOKENS:
        size -= 1
    if size < len(text):
        end.insert(0, text[size:])
    return Prompt(text[:size], (*([" ".join(end)] if end else []), *sentences[1:]))
