"""The order of positions of a frame, and the padding of a batch."""

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models.script import Character, FrameScript
from models.sequence import Frame, Kind, build_sequence, collate_sequences

WORDS = ["Characters", ":", "Ann", "Bob", "Scene", "Elements", "Plot"]
S, E, W, T, R = Kind.START_OF_FRAME, Kind.END_OF_FRAME, Kind.WORD, Kind.TOKEN, Kind.REFERENCE


@pytest.fixture
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({word: index + 10 for index, word in enumerate(WORDS)}, unk_token="Ann"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def make_frame(tokens: np.ndarray | None = None) -> Frame:
    script = FrameScript(
        characters=[Character(identity="Ann", description=["Ann wears red."]), Character(identity="Bob")],
        scene_elements=["It is dark."],
        plot=["Ann moves.", "Bob stays."],
    )
    sentences = np.arange(4, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    return Frame(script.layout(), sentences, {1: np.full(5, 7, np.float32)}, tokens)


def test_a_frame_is_laid_out_as_in_the_paper(tokenizer: Tokenizer) -> None:
    tokens = np.asarray([[1, 2], [3, 4]], np.float32)
    sequence = build_sequence([make_frame(tokens)], tokenizer)
    sentence, face = Kind.SENTENCE, Kind.FACE
    assert sequence.kinds.tolist() == [
        *(S, W, W),  # Characters:
        *(W, W, sentence),  # Ann: has no face
        *(W, W, face),  # Bob: has no sentence
        *(W, W, W, sentence),  # Scene Elements:
        *(W, W, sentence, sentence),  # Plot:
        *(E, T, T),
    ]
    words = sequence.words[sequence.kinds == W]
    assert words.tolist() == [10, 11, 12, 11, 13, 11, 14, 15, 11, 16, 11]
    assert [row[0] for row in sequence.sentences] == [0, 1, 2, 3]
    assert [row.tolist() for row in sequence.tokens] == tokens.tolist()


def test_references_come_first_as_tokens_alone(tokenizer: Tokenizer) -> None:
    tokens = np.zeros((2, 2), np.float32)
    sequence = build_sequence([make_frame(tokens)] * 2, tokenizer, [tokens + 1, tokens + 2])
    assert sequence.kinds[:5].tolist() == [R, R, R, R, S]
    assert (sequence.kinds == R).sum() == 4
    assert (sequence.kinds == T).sum() == 4
    assert [row[0] for row in sequence.tokens] == [1, 1, 2, 2, 0, 0, 0, 0]


def test_a_frame_to_be_made_ends_with_end_of_frame(tokenizer: Tokenizer) -> None:
    assert build_sequence([make_frame()], tokenizer).kinds[-1] == E


def test_batch_is_padded_at_the_end_and_rows_stay_in_order(tokenizer: Tokenizer) -> None:
    tokens = np.ones((2, 2), np.float32)
    short, long = (build_sequence([make_frame(tokens * n)] * n, tokenizer) for n in (1, 2))
    batch = collate_sequences([short, long], 3, 5, 2)
    assert batch.kinds.shape == (2, len(long.kinds))
    assert (batch.kinds[0, len(short.kinds) :] == Kind.PADDING).all()
    assert batch.tokens[:, 0].tolist() == [1, 1, 2, 2, 2, 2]
    assert batch.faces.shape == (3, 5)


def test_batch_without_faces_or_sentences(tokenizer: Tokenizer) -> None:
    frame = Frame(FrameScript().layout(), np.empty((0, 3), np.float32))
    batch = collate_sequences([build_sequence([frame], tokenizer)], 3, 5, 2)
    assert (batch.sentences.shape, batch.faces.shape, batch.tokens.shape) == ((0, 3), (0, 5), (0, 2))


def test_missing_sentence_embedding_is_refused(tokenizer: Tokenizer) -> None:
    frame = make_frame()
    wrong = Frame(frame.pieces, frame.sentences[:-1])
    with pytest.raises(ValueError, match="3 sentence embeddings for a script of 4 sentences"):
        build_sequence([wrong], tokenizer)
