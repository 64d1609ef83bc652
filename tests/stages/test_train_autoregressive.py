"""Training of a tiny story model on made tokens: what it draws, resumes, measures and refuses."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaModel

from models.autoregressive import load_autoregressive
from models.sequence import Kind
from models.token_table import TokenTable, TokenTableError
from stages.errors import ComputationError, MissingInputError
from stages.spec import no_progress
from stages.train_autoregressive import SPEC, TrainAutoregressive, TrainAutoregressiveConfig, _make_windows
from tests.stages.tiny_story_model import make_config, make_rows, read_files, train, write_rows, write_trunk


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_trunk(tmp_path_factory.mktemp("trunk"))


def test_it_learns_to_follow_the_script(trunk: str, tmp_path: Path) -> None:
    config = make_config(trunk, steps=150, input_dropout=0.1, residual_dropout=0.1)
    metrics = train(config, write_rows(tmp_path, make_rows()), tmp_path)
    assert metrics["nll"] < metrics["nll_gaussian_full"] - 0.1
    assert metrics["nll"] < metrics["nll_scripts_shuffled"] - 0.5
    assert (metrics["heldout_frames"], metrics["training_frames"]) == (12, 28)
    assert metrics["unit"].startswith("nats per token dimension")
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    first, last = ([p["loss"] for p in history if p["phase"] == "train"][i] for i in (0, -1))
    assert last < first
    heldout = [p for p in history if p["phase"] == "heldout"]
    assert heldout[-1] == {"phase": "heldout", "step": 150, "loss": pytest.approx(metrics["nll"])}


class Interrupted(Exception):
    pass


def test_resumed_equals_uninterrupted_bit_for_bit(trunk: str, tmp_path: Path) -> None:
    table, config = write_rows(tmp_path, make_rows()), make_config(trunk)

    def stop_at_seven(done: int, total: int, message: str) -> None:
        if done == 7:
            raise Interrupted

    train(config, table, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, table, tmp_path / "parts", stop_at_seven)
    assert (tmp_path / "parts" / "scratch" / "checkpoints" / "00000006-000").is_dir()
    seen: list[int] = []
    train(config, table, tmp_path / "parts", lambda done, total, message: seen.append(done))
    assert seen[0] == 7  # six of eight steps were in the checkpoint
    assert read_files(tmp_path / "parts") == read_files(tmp_path / "whole")
    assert set(read_files(tmp_path / "whole")) == {"config.json", "history.json", "metrics.json", "model.safetensors"}


def test_seed_changes_the_result_and_checkpoints_do_not(trunk: str, tmp_path: Path) -> None:
    table = write_rows(tmp_path, make_rows())
    for name, changes in (("a", {}), ("b", {"checkpoint_steps": 100}), ("c", {"seed": 1})):
        train(make_config(trunk, **changes), table, tmp_path / name)
    a, b, c = (read_files(tmp_path / name)["model.safetensors"] for name in "abc")
    assert a == b != c
    assert "checkpoint_steps" not in make_config(trunk).recipe()


def test_how_it_is_computed_does_not_change_the_result(trunk: str, tmp_path: Path) -> None:
    table = write_rows(tmp_path, make_rows())
    ways = {"plain": {}, "recomputed": {"gradient_checkpointing": True}, "loaded": {"loader_workers": 2}}
    for name, changes in ways.items():
        train(make_config(trunk, micro_batches=2, steps=4, **changes), table, tmp_path / name)
        assert not make_config(trunk, **changes).recipe().keys() & changes.keys()
    for name in ways:
        assert read_files(tmp_path / name) == read_files(tmp_path / "plain")


def test_half_precision_is_near_and_kept_in_float32(trunk: str, tmp_path: Path) -> None:
    table = write_rows(tmp_path, make_rows())
    whole = train(make_config(trunk), table, tmp_path / "whole")
    half = train(make_config(trunk, precision="bfloat16"), table, tmp_path / "half")
    assert half["nll"] != whole["nll"]
    assert half["nll"] == pytest.approx(whole["nll"], abs=0.05)
    weights = load_file(tmp_path / "half" / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_numbers_of_each_step_are_logged_beside_the_results(trunk: str, tmp_path: Path) -> None:
    config = make_config(trunk, steps=3, log_dir=tmp_path / "logs")
    train(config, write_rows(tmp_path, make_rows()), tmp_path)
    events = EventAccumulator(str(tmp_path / "logs" / "scratch"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss", "nll", "l1", "l2", "learning_rate", "new_learning_rate", "gradient_norm", "wait_share", "seconds",
        "positions_per_s",
    }  # fmt: skip
    rates = [event.value for event in events.Scalars("learning_rate")]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3])
    assert all(0 <= event.value <= 1 for event in events.Scalars("wait_share"))


def test_words_stay_frozen_and_the_model_loads(trunk: str, tmp_path: Path) -> None:
    train(make_config(trunk), write_rows(tmp_path, make_rows()), tmp_path)
    model = load_autoregressive(tmp_path / "out" / "model.safetensors")
    before = LlamaModel.from_pretrained(trunk)
    assert torch.equal(model.trunk.embed_tokens.weight, before.embed_tokens.weight)
    assert not torch.equal(model.trunk.norm.weight, before.norm.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["token_dim"] == 4


def draw_windows(trunk: str, tmp_path: Path, count: int, **changes: Any) -> list[Any]:
    stage = TrainAutoregressive(make_config(trunk, **changes))
    table = TokenTable(write_rows(tmp_path, make_rows()))
    windows = _make_windows(stage._config, table, stage._build_model(table).tokenizer)
    return [windows.draw(np.random.default_rng(seed)) for seed in range(count)]


def find_frames(window: Any, kind: Kind) -> list[tuple[int, int, bool]]:
    """Film, frame and whether it is the mirror image, of each frame in a window whose tokens are of the kind."""
    known = {}
    for row in make_rows():
        key = (int(row["film_id"][-1]), row["frame_index"] // 5)
        known[row["tokens"].astype(np.float32).tobytes()] = (*key, False)
        known[row["mirrored_tokens"].astype(np.float32).tobytes()] = (*key, True)
    kinds = [k for k in window.kinds if k in (Kind.TOKEN, Kind.REFERENCE)]
    pairs = zip(window.tokens[::2], window.tokens[1::2], kinds[::2], strict=True)
    return [known[np.stack([a, b]).tobytes()] for a, b, found in pairs if found == kind]


def test_windows_are_consecutive_training_frames_flipped_and_reversed(trunk: str, tmp_path: Path) -> None:
    seen = set()
    for window in draw_windows(trunk, tmp_path, 40):
        frames = find_frames(window, Kind.TOKEN)
        assert len({(film, mirrored) for film, _, mirrored in frames}) == 1
        steps = {b[1] - a[1] for a, b in pairwise(frames)}
        assert steps in ({1}, {-1})
        assert max(frame for _, frame, _ in frames) < 14
        seen.add((steps.pop(), frames[0][2]))
    assert seen == {(1, False), (1, True), (-1, False), (-1, True)}


def test_montage_cuts_a_window_once_between_two_stretches(trunk: str, tmp_path: Path) -> None:
    cuts = []
    for window in draw_windows(trunk, tmp_path, 40, montage_probability=1.0, window_frames=6):
        frames = find_frames(window, Kind.TOKEN)
        assert len(frames) == 6
        joins = [a[0] != b[0] or abs(b[1] - a[1]) != 1 for a, b in pairwise(frames)]
        assert sum(joins) <= 1
        cuts += [place for place, cut in enumerate(joins) if cut]
    assert set(cuts) == {0, 1, 2, 3, 4}


def test_references_come_from_outside_the_window(trunk: str, tmp_path: Path) -> None:
    counts = set()
    for window in draw_windows(trunk, tmp_path, 30):
        references, frames = find_frames(window, Kind.REFERENCE), find_frames(window, Kind.TOKEN)
        counts.add(len(references))
        assert not set(references) & set(frames)
        assert {(f, m) for f, _, m in references} <= {(f, m) for f, _, m in frames}
        assert all(frame < 14 for _, frame, _ in references)
    assert counts == {0, 3}


def test_face_is_never_the_frames_own_when_there_is_another(tmp_path: Path) -> None:
    table = TokenTable(write_rows(tmp_path, make_rows()))
    for row in (0, 3, 17, 25, 39):
        drawn = {int(table.frame(row, np.random.default_rng(seed)).faces[0][0]) for seed in range(60)}
        own = 100 * (row // 20) + row % 20
        assert own not in drawn
        assert len(drawn) > 5
        assert all(face // 100 == row // 20 and face % 100 < 14 for face in drawn)  # this film, training frames


def test_a_single_face_is_used_and_a_missing_one_left_out(tmp_path: Path) -> None:
    rows = make_rows(films=1, frames=3, heldout=0, faces=False)
    rows[1] |= {"face_character": [0], "face_embeddings": np.ones(3, np.float32)}
    table = TokenTable(write_rows(tmp_path, rows))
    assert table.frame(1, np.random.default_rng(0)).faces[0].tolist() == [1, 1, 1]
    rows[1]["face_character"] = [-1]
    table = TokenTable(write_rows(tmp_path, rows))
    assert table.frame(1, np.random.default_rng(0)).faces == {}


def test_without_heldout_frames_there_is_no_heldout_number(trunk: str, tmp_path: Path) -> None:
    metrics = train(make_config(trunk, steps=1), write_rows(tmp_path, make_rows(heldout=0)), tmp_path)
    assert [name for name, value in metrics.items() if value is None] == [
        "nll", "nll_scripts_shuffled", "nll_gaussian_diagonal", "nll_gaussian_full", "gaussian_shrinkage"
    ]  # fmt: skip


def test_no_training_frames(trunk: str, tmp_path: Path) -> None:
    with pytest.raises(ComputationError, match="no keyframe is for training"):
        train(make_config(trunk), write_rows(tmp_path, make_rows(heldout=20)), tmp_path)


def test_no_tokens(trunk: str, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="there are no tokens: run the tokenize stage first"):
        TrainAutoregressive(make_config(trunk))({"tokens": []}, tmp_path, tmp_path, no_progress)


def test_a_table_of_something_else(trunk: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(pa.table({"x": [1]}), other / "x.parquet")
    with pytest.raises(TokenTableError, match=r"other holds no table of tokens .*make it with tokenize"):
        train(make_config(trunk), other, tmp_path)
    broken = write_rows(tmp_path, make_rows())
    (broken / "tokens.arrow").write_bytes((broken / "tokens.arrow").read_bytes()[:-100])
    with pytest.raises(TokenTableError, match=r"tokens holds no table of tokens .*make it with tokenize"):
        TokenTable(broken)


def test_a_loss_that_is_no_number_stops_training(trunk: str, tmp_path: Path) -> None:
    rows = make_rows()
    rows[5]["sentence_embeddings"] = np.full((1, 6), np.nan, np.float32)
    rows[5]["mirrored_sentence_embeddings"] = rows[5]["sentence_embeddings"]
    with pytest.raises(ComputationError, match="the loss of step 0 is nan: lower the learning rates"):
        train(make_config(trunk, batch_windows=16), write_rows(tmp_path, rows), tmp_path)


def test_weights_are_named_only_where_they_are_ours() -> None:
    assert TrainAutoregressiveConfig(trunk="smollm2_135m").weights() == ("smollm2_135m",)
    assert TrainAutoregressiveConfig().weights() == ("llama2_7b",)
    assert SPEC.load() is TrainAutoregressive
