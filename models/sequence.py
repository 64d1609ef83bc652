"""The sequence that the story model reads: scripts and frame tokens, frame after frame.

One frame is: START_OF_FRAME, its script (identifiers as words, one position a description sentence, one position a
face), END_OF_FRAME, then its tokens. Reference frames come first, as their tokens alone. The position before a
frame token predicts it: END_OF_FRAME the first, the first token the second.

Dimensions: position = place in the sequence, sentence, face = rows in order of position, text, face_width = widths of
their embeddings, reference, token, dim = width of a frame token.

Source: the paper, section 3.3, figure 2 and appendix A.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from models.script import Piece


class Kind(IntEnum):
    """What stands at a position."""

    PADDING = 0
    START_OF_FRAME = 1
    END_OF_FRAME = 2
    WORD = 3
    SENTENCE = 4
    FACE = 5
    TOKEN = 6
    REFERENCE = 7


@dataclass(frozen=True)
class Frame:
    """A keyframe as the story model sees it.

    Attributes:
        pieces: Its script, as `FrameScript.layout()` gives it.
        sentences: Embeddings of the sentence pieces, in their order.
        faces: Face embedding of each character that has one, by position among the frame's characters.
        tokens: The compressed keyframe; None where it is still to be made.
    """

    pieces: Sequence[Piece]
    sentences: Float[np.ndarray, "sentence text"]
    faces: Mapping[int, Float[np.ndarray, " face_width"]] = field(default_factory=dict)
    tokens: Float[np.ndarray, "token dim"] | None = None


@dataclass(frozen=True)
class FrameSequence:
    """One sequence; the rows of `sentences`, `faces` and `tokens` stand in the order of their positions.

    Attributes:
        kinds: `Kind` of each position.
        words: Vocabulary index where the kind is WORD, 0 elsewhere.
        tokens: Rows of the REFERENCE and the TOKEN positions.
    """

    kinds: Int[np.ndarray, " position"]
    words: Int[np.ndarray, " position"]
    sentences: list[Float[np.ndarray, " text"]]
    faces: list[Float[np.ndarray, " face_width"]]
    tokens: list[Float[np.ndarray, " dim"]]


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences of one length, padded at the end; rows run over the batch in row-major order of positions."""

    kinds: Int[Tensor, "batch position"]
    words: Int[Tensor, "batch position"]
    sentences: Float[Tensor, "sentence text"]
    faces: Float[Tensor, "face face_width"]
    tokens: Float[Tensor, "token dim"]

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The batch on another device."""
        return SequenceBatch(*(value.to(device, non_blocking=True) for value in vars(self).values()))

    def pin_memory(self) -> "SequenceBatch":
        """The batch in memory from which an accelerator copies by itself."""
        return SequenceBatch(*(value.pin_memory() for value in vars(self).values()))


def build_sequence(
    frames: Sequence[Frame],
    tokenizer: Tokenizer,
    references: Sequence[Float[np.ndarray, "token dim"]] = (),
) -> FrameSequence:
    """Lay out frames after reference frames.

    Args:
        frames: In order of time.
        tokenizer: Of the language model; splits identifiers into words.
        references: Tokens of the reference frames.

    Raises:
        ValueError: A frame has more or fewer sentence embeddings than sentences.
    """
    sequence = FrameSequence([], [], [], [], [])  # lists while it grows
    for reference in references:
        _add_tokens(sequence, Kind.REFERENCE, reference)
    for frame in frames:
        _add_script(sequence, frame, tokenizer)
        if frame.tokens is not None:
            _add_tokens(sequence, Kind.TOKEN, frame.tokens)
    kinds, words = (np.asarray(column, np.int64) for column in (sequence.kinds, sequence.words))
    return FrameSequence(kinds, words, sequence.sentences, sequence.faces, sequence.tokens)


def _add(sequence: FrameSequence, kind: Kind, word: int = 0) -> None:
    sequence.kinds.append(kind)
    sequence.words.append(word)


def _add_tokens(sequence: FrameSequence, kind: Kind, tokens: Float[np.ndarray, "token dim"]) -> None:
    for token in tokens:
        _add(sequence, kind)
        sequence.tokens.append(token)


def _add_script(sequence: FrameSequence, frame: Frame, tokenizer: Tokenizer) -> None:
    sentences = [piece for piece in frame.pieces if piece.kind == "sentence"]
    if len(sentences) != len(frame.sentences):
        raise ValueError(f"{len(frame.sentences)} sentence embeddings for a script of {len(sentences)} sentences")
    embeddings = iter(frame.sentences)
    _add(sequence, Kind.START_OF_FRAME)
    for piece in frame.pieces:
        if piece.kind == "identifier":
            for word in tokenizer.encode(piece.text, add_special_tokens=False).ids:
                _add(sequence, Kind.WORD, word)
        elif piece.kind == "sentence":
            _add(sequence, Kind.SENTENCE)
            sequence.sentences.append(next(embeddings))
        elif piece.character in frame.faces:
            _add(sequence, Kind.FACE)
            sequence.faces.append(frame.faces[piece.character])
    _add(sequence, Kind.END_OF_FRAME)


def collate_sequences(
    sequences: Sequence[FrameSequence], text_width: int, face_width: int, token_dim: int
) -> SequenceBatch:
    """Pad sequences to the longest one and stack their rows.

    Args:
        sequences: At least one.
        text_width: Width of a sentence embedding (needed where there is none).
        face_width: Width of a face embedding.
        token_dim: Width of a frame token.
    """
    longest = max(len(sequence.kinds) for sequence in sequences)
    kinds = np.full((len(sequences), longest), Kind.PADDING, np.int64)
    words = np.zeros((len(sequences), longest), np.int64)
    for row, sequence in enumerate(sequences):
        kinds[row, : len(sequence.kinds)] = sequence.kinds
        words[row, : len(sequence.words)] = sequence.words

    def stacked(name: str, width: int) -> Tensor:
        rows = [value for sequence in sequences for value in getattr(sequence, name)]
        return torch.from_numpy(np.asarray(rows, np.float32).reshape(-1, width))

    return SequenceBatch(
        torch.from_numpy(kinds),
        torch.from_numpy(words),
        stacked("sentences", text_width),
        stacked("faces", face_width),
        stacked("tokens", token_dim),
    )
