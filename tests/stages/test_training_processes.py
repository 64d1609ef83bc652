"""Training on two processes, started on this machine and by Ray Train; what goes wrong in one of them is told."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors.torch import load_file

from stages.cluster import RayExecutor
from stages.engine import Engine, Work
from stages.errors import ComputationError, MissingInputError
from stages.spec import Progress, no_progress
from stages.train_autoregressive import SPEC
from stages.training_processes import run_processes
from stages.worker import WorkerSettings
from storage.artifacts import Artifact, content_digest
from storage.catalog import Catalog
from storage.objects import ObjectStore
from tests.stages.tiny_story_model import make_config, make_rows, read_files, train, write_rows, write_trunk


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_trunk(tmp_path_factory.mktemp("trunk"))


def assert_equal_up_to_rounding(one: Path, two: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name], atol=2e-4, rtol=1e-3, msg=name)


def test_two_processes_equal_one_with_two_micro_batches(trunk: str, tmp_path: Path) -> None:
    table, told = write_rows(tmp_path, make_rows()), []
    settings = {"micro_batches": 2, "gradient_checkpointing": True}
    one = train(make_config(trunk, micro_batches=2), table, tmp_path / "one")
    two = train(make_config(trunk, processes=2, **settings), table, tmp_path / "two", lambda *p: told.append(p))
    assert two["nll"] == pytest.approx(one["nll"], abs=1e-3)
    assert_equal_up_to_rounding(tmp_path / "one" / "out", tmp_path / "two" / "out")
    assert read_files(tmp_path / "one").keys() == read_files(tmp_path / "two").keys()
    assert told[-1][1] == 8
    alone = train(make_config(trunk), table, tmp_path / "alone")  # the same windows, but not the same draws of all else
    assert abs(alone["nll"] - one["nll"]) > 1e-4


def report_group(factor: int, progress: Progress) -> dict[str, Any]:
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    progress(1, 1, "added")
    return {"total": factor * total.item(), "backend": dist.get_backend(), "processes": dist.get_world_size()}


def fail_in_the_second(error: Exception, progress: Progress) -> dict[str, Any]:
    if dist.get_rank() == 1:
        raise error
    dist.barrier()
    return {}


def test_processes_of_this_machine_form_a_group(tmp_path: Path) -> None:
    told: list[Any] = []
    result = run_processes(partial(report_group, 10), 2, 1, tmp_path, lambda *p: told.append(p))
    assert result == {"total": 30, "backend": "gloo", "processes": 2}
    assert not list(tmp_path.iterdir())


def test_an_error_of_any_process_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ComputationError, match="^no film: get one$"):
        run_processes(partial(fail_in_the_second, MissingInputError("no film: get one")), 2, 1, tmp_path, no_progress)


def die(progress: Progress) -> dict[str, Any]:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()
    return {}


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    with pytest.raises(ComputationError, match="(exit code 3|Connection|connection)"):
        run_processes(die, 2, 1, tmp_path, no_progress)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"batch_windows": 3, "micro_batches": 2}, "batch_windows 3 cannot be cut into 2 equal micro_batches"),
        ({"batch_windows": 4, "processes": 2}, "2 processes cannot share 1 micro_batches evenly: raise batch_windows"),
    ],
)
def test_steps_that_processes_cannot_share(trunk: str, settings: dict[str, int], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        make_config(trunk, **settings)


@pytest.mark.slow
def test_ray_train_equals_one_process(trunk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with weights at a relative path, though Ray Train's processes work in a folder of their own."""
    pytest.importorskip("pandas")  # which Ray Train needs
    monkeypatch.chdir(Path(trunk).parent)
    table = write_rows(tmp_path, make_rows())
    train(make_config(trunk, micro_batches=2), table, tmp_path / "one")
    store = ObjectStore(str(tmp_path / "objects"), tmp_path / "cache")
    files = tuple(store.put(path, path.name) for path in sorted(table.iterdir()))
    tokens = Artifact("tokens-x", "tokens", "set", "f", content_digest(files), {}, files, ())
    config = make_config(Path(trunk).name, micro_batches=2, processes=2)
    work = Work(SPEC, config, "set", {"tokens": [tokens]}, {})
    executor = RayExecutor(WorkerSettings(str(tmp_path / "objects"), tmp_path / "scratch", None), None, 2)
    told: list[Any] = []
    try:
        engine = Engine(Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}"), store, executor)
        ((_, _, result, _),) = executor.run(
            SPEC, config, [(work, engine.plan_units(work)[0])], lambda *p: told.append(p)
        )
        assert ray.available_resources()["CPU"] > 1.8  # the workers are gone
    finally:
        executor.close()
    assert result.error is None
    (tmp_path / "two").mkdir()
    for file in result.files:
        (tmp_path / "two" / file.name).write_bytes(store.path(file).read_bytes())
    assert_equal_up_to_rounding(tmp_path / "one" / "out", tmp_path / "two")
    assert any("loss" in message for _, _, message in told)
