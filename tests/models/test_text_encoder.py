"""Sentence embeddings from the packaged encoder."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import weights
from models.text_encoder import BATCH_SENTENCES, SentenceEncoder, lost_positions, open_sentence_encoder
from tests.tiny_checkpoints import save_longclip


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return open_sentence_encoder(weights.folder("minilm_l6"))


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


@pytest.fixture
def longclip(tmp_path):
    """LongCLIP as it is published, brought by hand and converted; and the tower that it holds."""
    tower = save_longclip(tmp_path / "brought")
    weights.pull(["longclip_l"], tmp_path / "weights", print, tmp_path / "brought")
    return tower, weights.folder("longclip_l", tmp_path / "weights")


def test_longclip_is_the_tower_of_its_file(longclip):
    tower, folder = longclip
    sentences = ["a b c", "z", " ".join("abcdefghij" * 9)]
    words = torch.zeros(3, 92, dtype=torch.long)
    for row, sentence in enumerate(sentences):
        ids = [27, *(ord(letter) - 96 for letter in sentence.split()), 28]
        words[row, : len(ids)] = torch.tensor(ids)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(tower(words), dim=-1).numpy()
    found = open_sentence_encoder(folder).encode(sentences)
    assert found.shape == (3, 24) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_longclip_reads_248_words_and_no_more(longclip):
    encoder = open_sentence_encoder(longclip[1])
    long = ["a"] * 246
    changed = [*long[:245], "b"]
    full, other, longer = encoder.encode([" ".join(words) for words in (long, changed, [*long, "c"])])
    assert not np.allclose(full, other)
    np.testing.assert_allclose(full, longer, atol=1e-6)


def test_lost_positions_are_noticed(longclip, caplog):
    tower, folder = longclip
    short = torch.randn(77, 64)
    steps = torch.arange(228) / 4
    low = steps.long()
    stretched = torch.lerp(short[20:][low.clamp(max=55)], short[20:][(low + 1).clamp(max=56)], (steps - low)[:, None])
    assert lost_positions(torch.cat([short[:20], stretched]))
    assert not lost_positions(tower.positional_embedding_res)
    assert not lost_positions(short)
    path = folder / "longclip-L.safetensors"
    save_file(load_file(path) | {"positional_embedding": torch.cat([short[:20], stretched])}, path)
    open_sentence_encoder(folder)
    assert "trained ones are lost" in caplog.text


def test_a_folder_without_an_encoder_is_named(tmp_path):
    with pytest.raises(weights.WeightsError, match="no sentence encoder at .*expected longclip"):
        open_sentence_encoder(tmp_path)
    (tmp_path / "longclip-L.safetensors").write_bytes(b"no")
    with pytest.raises(weights.WeightsError, match="no LongCLIP at"):
        open_sentence_encoder(tmp_path)
