"""Sentence embeddings from the packaged encoder."""

import numpy as np
import pytest

from models import weights
from models.text_encoder import BATCH_SENTENCES, SentenceEncoder


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder(weights.folder("minilm_l6"))


def test_near_in_meaning_is_near_in_space(encoder: SentenceEncoder) -> None:
    red, crimson, car = encoder.encode(["A man in a red coat.", "A man wears a crimson jacket.", "A car on a road."])
    assert red @ crimson > 0.6 > red @ car


def test_shape_type_and_length(encoder: SentenceEncoder) -> None:
    rows = encoder.encode(["One.", "Two, and a longer one."])
    assert (rows.shape, rows.dtype) == ((2, encoder.width), np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.width)


def test_order_and_repetition_do_not_matter(encoder: SentenceEncoder) -> None:
    sentences = [f"Person {n} is {'far ' * (n % 5)}on the left." for n in range(BATCH_SENTENCES + 3)]
    forward, backward = encoder.encode(sentences), encoder.encode([*sentences[::-1], sentences[0]])
    assert np.array_equal(forward, backward[-2::-1])
    assert np.array_equal(backward[-1], forward[0])


def test_neighbours_in_the_batch_do_not_matter(encoder: SentenceEncoder) -> None:
    long = "The picture is very bright and full of fine detail, and much more is said about it."
    np.testing.assert_allclose(encoder.encode(["Dark.", long])[0], encoder.encode(["Dark."])[0], atol=1e-6)


def test_overlong_sentence_is_cut(encoder: SentenceEncoder) -> None:
    assert np.isfinite(encoder.encode(["word " * 2000])).all()
