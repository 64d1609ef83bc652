"""Numbers of a training run in TensorBoard and in trackers, each in its own real store."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.training_log import TrackerError, load_tracker, open_log


def read(folder: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_numbers_are_in_tensorboard_and_what_is_done_again_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "a"
    with pytest.raises(KeyboardInterrupt), open_log(folder, "none", {}, 0) as write:
        for step in (1, 2, 3):
            write(step, {"loss": step / 2, "nll": 0.25})
        raise KeyboardInterrupt
    with open_log(folder, "none", {}, 2) as write:  # goes on from a checkpoint of step 2
        write(3, {"loss": 7.0})
    assert read(folder, "loss") == {1: 0.5, 2: 1.0, 3: 7.0}
    assert read(folder, "nll") == {1: 0.25, 2: 0.25}


def test_a_tracker_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    with pytest.raises(TrackerError, match="tracker 'wandb' cannot be imported .*pip install wandb.*tracker: none"):
        load_tracker("wandb")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_gets_settings_and_numbers_and_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.sqlite")
    for step in (1, 2):
        with open_log(tmp_path / "a run", "mlflow", {"steps": 8}, step - 1) as write:
            write(step, {"loss": 10.0 * step})
    (run,) = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("moviedreamer").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params) == ("a run", "FINISHED", {"steps": "8"})
    found = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert {metric.step: metric.value for metric in found} == {1: 10.0, 2: 20.0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_wandb_gets_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_log(tmp_path / "a-run", "wandb", {"steps": 8}, 0) as write:
        write(1, {"loss": 10.0})
    wandb.teardown()  # its service writes the last of it when it ends
    (stored,) = (tmp_path / "a-run" / "wandb").glob("offline-run-*/run-a-run.wandb")
    assert b"loss" in stored.read_bytes()
