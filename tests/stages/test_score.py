"""The score: a trained model tells held-out keyframes apart, an untrained one guesses, and units do not matter."""

import json

import numpy as np
import pytest

from stages.errors import MissingInputError
from stages.score import Score, ScoreConfig
from stages.spec import no_progress
from tests.stages.test_train_autoregressive import make_config, make_rows, train, trunk, write_rows

assert trunk  # a fixture


def score(table, model, folder, **config):
    folder.mkdir(exist_ok=True)
    inputs = {"tokens": sorted(table.iterdir()), "autoregressive": sorted((model / "out").iterdir())}
    found = Score(ScoreConfig(window_frames=6, **config))(inputs, folder, folder, no_progress)
    assert json.loads((folder / "score.json").read_text()) == found
    return found


@pytest.fixture(scope="module")
def learned(trunk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    table = write_rows(folder, make_rows())
    train(make_config(trunk, steps=150, input_dropout=0.1, residual_dropout=0.1), table, folder)
    return table, folder


def test_a_model_that_learned_is_better_than_guessing(trunk, learned, tmp_path):
    table, model = learned
    found = score(table, model, tmp_path)
    assert (found["keyframes"], found["split"]) == (12, "heldout")
    assert found["chance"] == pytest.approx(np.mean(1 / np.arange(1, 13)))
    assert found["mean_reciprocal_rank"] > 1.5 * found["chance"]
    train(make_config(trunk, steps=1, warmup_steps=1000), table, tmp_path / "raw")
    assert score(table, tmp_path / "raw", tmp_path / "b")["mean_reciprocal_rank"] < found["mean_reciprocal_rank"]


def test_films_kept_out_as_a_whole_come_first(learned, tmp_path):
    _, model = learned
    rows = make_rows()
    for row in rows[20:]:
        row["split"] = "test"
    table = write_rows(tmp_path, rows)
    found = score(table, model, tmp_path / "out", candidates=15)
    assert (found["keyframes"], found["split"]) == (15, "test")


def test_the_unit_of_the_tokens_does_not_matter(trunk, learned, tmp_path):
    """Another autoencoder's tokens, a thousand times as large: the likelihood changes, the rank does not."""
    rows = make_rows()
    for row in rows:
        row["tokens"], row["mirrored_tokens"] = row["tokens"] * 1000, row["mirrored_tokens"] * 1000
    table = write_rows(tmp_path, rows)
    train(make_config(trunk, steps=150, input_dropout=0.1, residual_dropout=0.1), table, tmp_path)
    large, small = score(table, tmp_path, tmp_path / "a"), score(*learned, tmp_path / "b")
    assert large["mean_reciprocal_rank"] == pytest.approx(small["mean_reciprocal_rank"], abs=0.15)


def test_nothing_held_out_is_an_error_with_the_remedy(learned, tmp_path):
    table = write_rows(tmp_path, make_rows(heldout=0))
    with pytest.raises(MissingInputError, match=r"0 keyframes are held out.*shards.heldout_share"):
        score(table, learned[1], tmp_path / "out")
