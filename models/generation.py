"""Sampling from the story model: frame after frame, token after token, of several stories at once.

A frame takes one pass of the trunk for each of its tokens: its script is read together with the last token of the
frame before, every further token by itself. Keys and values are kept in tensors that never change their shape.

With guidance, what a frame would be without its script is predicted in the same passes. Words of identifiers and the
frame's marks are read a second time beside the first, at the same positions, and see all frames before but neither
sentences nor faces of their own: they are hidden as token masking hides positions in training. They are forgotten when
the frame is made.

Dimensions: story = row of the batch, frame, token = tokens a frame, dim = width of a token, hidden = width of the
trunk, column = what may be read, entry = what one pass reads of a story, aside = of these what is read twice.

Source: the paper, section 3.3 (equation 5, few-shot) and appendix A (128 context frames); for the window that slides,
Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.autoregressive import AutoregressiveModel
from models.gmm import Mixture, guide
from models.sequence import Frame, FrameSequence, Kind, build_sequence
from models.window_cache import Window, WindowCache, join_places

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        window_frames: Most frames, of history and made, that the model sees at once; at least 1.
        overlap_frames: Most frames that a fresh window takes over; less than `window_frames`.
        window: What happens when the window is full. "restart": a fresh one starts with the references and the last
            frames made, each with its script. "slide": the oldest frame falls out whole; references and the first
            frames stay.
        sink_frames: Frames that stay in a window that slides, at least 1; it needs room for two more.
        temperature: Factor of the components' standard deviations.
        guidance: Weight w of classifier-free guidance by the script; 0 for none, as in the paper.

    Raises:
        ValueError: The numbers of frames do not fit the window.
    """

    window_frames: int = 128
    overlap_frames: int = 8
    window: Literal["restart", "slide"] = "restart"
    sink_frames: int = 1
    temperature: float = 1.0
    guidance: float = 0.0

    def __post_init__(self) -> None:
        most = self.window_frames - 1
        if not 0 <= self.overlap_frames <= most:
            raise ValueError(f"overlap_frames {self.overlap_frames}: expected 0 to window_frames - 1 = {most}")
        if self.window == "slide" and not 1 <= self.sink_frames < most:
            raise ValueError(f"sink_frames {self.sink_frames}: expected 1 to window_frames - 2 = {most - 1}")


@dataclass(frozen=True)
class Prompt:
    """A story to be told.

    Attributes:
        frames: Scripts to realise; tokens that they carry are ignored.
        history: Frames with tokens that come before, such as the end of a film that is to be continued.
        references: Tokens of frames whose style and characters to follow (few-shot); none for zero-shot.
        seed: Of the noise.
    """

    frames: Sequence[Frame]
    history: Sequence[Frame] = ()
    references: Sequence[Float[np.ndarray, "token dim"]] = ()
    seed: int = 0


DEFAULT_SAMPLING = Sampling()
HIDDEN_ASIDE = (Kind.SENTENCE, Kind.FACE)
"""What guidance takes away from a frame's script."""


def no_progress(done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def generate_many(
    model: AutoregressiveModel,
    prompts: Sequence[Prompt],
    sampling: Sampling = DEFAULT_SAMPLING,
    progress: Progress = no_progress,
) -> list[Float[np.ndarray, "frame token dim"]]:
    """Sample several stories in one batch. Scripts, lengths, histories and references may differ.

    A story's tokens are those that it gets alone, up to rounding: in float32, about 1e-5 of their size. (A component is
    drawn by comparing a random number with sums of weights; where the two agree to rounding, another one may be drawn.)

    Args:
        model: In evaluation mode.
        prompts: One a story.
        sampling: Of all of them.
        progress: Called after each pass over the stories with frames made and frames in all.
    """
    if not prompts:
        return []
    total = sum(len(prompt.frames) for prompt in prompts)
    sampler = Sampler(model, prompts, sampling)
    for _ in range(max(len(prompt.frames) for prompt in prompts)):
        progress(sampler.make_frames(), total)
    return sampler.tokens()


class Sampler:
    """Stories on the way: makes one more frame of each at a time."""

    def __init__(self, model: AutoregressiveModel, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        config, device = model.config, model.token_mean.device
        self._model, self._sampling = model, sampling
        self._previous = torch.zeros(len(prompts), config.tokens_per_frame, config.token_dim, device=device)
        self._unread = torch.zeros(len(prompts), model.trunk.config.hidden_size, device=device)
        self._stories = [_Story(model, prompt, sampling) for prompt in prompts]
        self._slots = max(story.slots for story in self._stories)
        # What is read aside, one for padding, and a few more: kernels like rows of eight.
        self._behind = 1 + (max(story.longest_frame for story in self._stories) if sampling.guidance else 0)
        self._behind += -(self._slots + self._behind) % 8
        for row in range(len(prompts)):
            self._open_window(row)
        sinks = max(story.window.sinks for story in self._stories)
        self._cache = WindowCache(model.trunk, len(prompts), self._slots + self._behind, sinks)

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values; always the same."""
        return self._cache.byte_count

    def tokens(self) -> list[Float[np.ndarray, "frame token dim"]]:
        """What was made of each story."""
        shape = tuple(self._previous.shape[1:])
        return [np.asarray(story.made, np.float32).reshape(-1, *shape) for story in self._stories]

    @torch.no_grad()
    def make_frames(self) -> int:
        """Make the next frame of every story that is not at its end; how many frames there are now."""
        self._make_room()
        hidden = self._read_scripts()
        tokens: list[Tensor] = []
        for previous in self._previous.unbind(1):
            if tokens:
                hidden = self._read_token()
            tokens.append(self._sample(hidden, previous))
            self._unread = self._model.token_projection(tokens[-1])
        self._previous = torch.stack(tokens, 1)
        raw = self._model.unstandardize(self._previous.flatten(0, 1)).view_as(self._previous).cpu().numpy()
        for story, made in zip(self._stories, raw, strict=True):
            story.add(made)
        return sum(len(story.made) for story in self._stories)

    def _make_room(self) -> None:
        """Where a window is full, open a fresh one, or let its oldest frame fall out."""
        back, slid = np.zeros(len(self._stories), np.int64), False
        for row, story in enumerate(self._stories):
            story.window.forget_aside()
            if story.is_done or not story.is_full:
                continue
            if self._sampling.window == "restart":
                self._open_window(row)
            else:
                back[row], slid = story.drop_oldest(), True
        if slid:
            self._cache.slide([story.window for story in self._stories], back)

    def _open_window(self, row: int) -> None:
        story = self._stories[row]
        story.open_window(self._slots, self._behind)
        self._previous[row] = 0
        if story.past:
            last = torch.tensor(np.asarray(story.past[-1].tokens, np.float32))  # a copy: a table's rows are read-only
            self._previous[row] = self._model.standardize(last.to(self._previous.device))

    def _read_scripts(self) -> list[Tensor]:
        """Read the last token made and the next script; in a fresh window, what it takes over and the script."""
        readings = [story.next_reading() for story in self._stories]
        embedded = self._model.embed(self._model.collate([reading.sequence for reading in readings]))
        return self._read(torch.cat([self._unread.unsqueeze(1), embedded], 1), readings)

    def _read_token(self) -> list[Tensor]:
        """Read the last token made."""
        readings = [_NO_READING if story.is_done else _TOKEN_READING for story in self._stories]
        return self._read(self._unread.unsqueeze(1), readings)

    def _read(self, source: Float[Tensor, "story column hidden"], readings: "Sequence[_Reading]") -> list[Tensor]:
        """Read on; the trunk's output at each story's last entry and, with guidance, at its last one aside."""
        columns, places, ends = [], [], []
        for story, reading in zip(self._stories, readings, strict=True):
            place = story.window.read(len(reading.columns))
            columns.append(reading.columns)
            ends.append([len(reading.columns) - 1])
            if self._sampling.guidance:
                aside = story.window.read_aside(place.positions[reading.aside])
                place = join_places([place, aside], np.concatenate)
                columns[-1] = np.concatenate([reading.columns, reading.columns[reading.aside]])
                ends[-1].append(len(columns[-1]) - 1)
            places.append(place)
        width = max(map(len, columns))
        padded = np.stack([np.pad(own, (0, width - len(own))) for own in columns])
        row = torch.arange(len(readings), device=source.device)
        inputs = source[row.unsqueeze(-1), torch.from_numpy(padded).to(source.device)]
        hidden = self._cache.read(inputs, join_places([place.padded(width) for place in places], np.stack))
        return [hidden[row, end] for end in torch.tensor(ends, device=source.device).unbind(-1)]

    def _sample(self, hidden: Sequence[Tensor], previous: Float[Tensor, "story dim"]) -> Float[Tensor, "story dim"]:
        """Draw each story's next token; the noise comes from the CPU, so that a seed means the same everywhere."""
        mixtures = []
        for output in hidden:
            mixture = self._model.mixture(output, previous)
            mixtures.append(Mixture(mixture.logits.cpu(), mixture.locations.cpu(), mixture.scales.cpu()))
        mixture = guide(*mixtures, self._sampling.guidance) if len(mixtures) > 1 else mixtures[0]
        drawn = [
            mixture[row : row + 1].sample(story.generator, self._sampling.temperature)
            for row, story in enumerate(self._stories)
        ]
        return torch.cat(drawn).to(previous.device)


@dataclass(frozen=True)
class _Reading:
    """What a story reads in one pass.

    Attributes:
        sequence: Entries to embed.
        columns: What to read, in order: 0 for the last token made, from 1 on the sequence's entries.
        aside: Which of these to read once more, aside; guidance takes what follows from them.
    """

    sequence: FrameSequence
    columns: Int[np.ndarray, " entry"]
    aside: Int[np.ndarray, " aside"]


_NONE = np.empty(0, np.int64)
_NO_READING = _Reading(FrameSequence(_NONE, _NONE, [], [], []), _NONE, _NONE)
_TOKEN_READING = replace(_NO_READING, columns=np.zeros(1, np.int64), aside=np.zeros(1, np.int64))


class _Story:
    """One story: what was made of it, its noise, and how its window is filled."""

    def __init__(self, model: AutoregressiveModel, prompt: Prompt, sampling: Sampling) -> None:
        self._prompt, self._sampling, self._model = prompt, sampling, model
        self.generator = torch.Generator().manual_seed(prompt.seed)
        self.made: list[Float[np.ndarray, "token dim"]] = []
        # What a fresh window takes over.
        self.past = deque(prompt.history, sampling.overlap_frames)
        self._lengths = [self._length(frame) for frame in (*self.past, *prompt.frames)]
        self._reference_length = sum(map(len, prompt.references))

    @property
    def is_done(self) -> bool:
        return len(self.made) == len(self._prompt.frames)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for one more frame."""
        return len(self._held) == self._sampling.window_frames

    @property
    def longest_frame(self) -> int:
        return max(self._lengths, default=0)

    @property
    def slots(self) -> int:
        """Enough for any window of this story, and at least one that no sink takes."""
        longest = heapq.nlargest(self._sampling.window_frames, self._lengths)
        return self._reference_length + sum(longest) + 1

    def open_window(self, slots: int, behind: int) -> None:
        """Begin a fresh window, with what it takes over still to be read."""
        sinks = 0
        if self._sampling.window == "slide":  # opened once, at the start
            sinks = self._reference_length + sum(self._lengths[: self._sampling.sink_frames])
        self.window = Window(slots, sinks, behind)
        self._held = [self._length(frame) for frame in self.past]
        self._is_fresh = True

    def drop_oldest(self) -> int:
        """Let the oldest frame fall out that is no sink; by how much positions have gone back."""
        return self.window.drop(self._held.pop(self._sampling.sink_frames))

    def next_reading(self) -> _Reading:
        """The last token made and the next frame's script; what a fresh window takes over, and the script."""
        if self.is_done:
            return _NO_READING
        script = replace(self._prompt.frames[len(self.made)], tokens=None)
        taken, references = (self.past, self._prompt.references) if self._is_fresh else ((), ())
        sequence = build_sequence([*taken, script], self._model.tokenizer, references)
        first = 1 if self._is_fresh else 0
        start = np.flatnonzero(sequence.kinds == Kind.START_OF_FRAME)[-1]
        aside = start + np.flatnonzero(~np.isin(sequence.kinds[start:], HIDDEN_ASIDE))
        self._held.append(len(sequence.kinds) - start + self._model.config.tokens_per_frame)
        self._is_fresh = False
        return _Reading(sequence, np.arange(first, 1 + len(sequence.kinds)), aside + 1 - first)

    def add(self, tokens: Float[np.ndarray, "token dim"]) -> None:
        """Take a frame made."""
        if not self.is_done:
            self.past.append(replace(self._prompt.frames[len(self.made)], tokens=tokens))
            self.made.append(tokens)

    def _length(self, frame: Frame) -> int:
        """Positions of a frame's script and tokens."""
        script = build_sequence([replace(frame, tokens=None)], self._model.tokenizer)
        return len(script.kinds) + self._model.config.tokens_per_frame
