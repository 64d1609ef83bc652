"""A training run on one process and on two: steps, restarts, and checkpoints that move between them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from models.processes import autocast, gather_weights, place_model, process_index, sum_over_processes
from models.sharded_checkpoint import newest_checkpoint
from models.training import TrainingRun, schedule_learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
PARTS = 2


class Network(nn.Module):
    """Layers, a frozen one, a parameter and a buffer of its own; two processes cannot share sizes evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("shift", torch.arange(5.0), persistent=False)

    def loss(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return (self.frozen(inputs) * self.scale + self.shift).square().mean()


def place(precision: Any = "float32") -> Network:
    def build(_: bool) -> Network:
        torch.manual_seed(0)
        return Network()

    return place_model(build, lambda model: model.layers, ["loss"], "cpu", precision)


def start(model: Network) -> TrainingRun:
    groups = [{}, {}]
    for name, parameter in model.named_parameters():
        groups[name.startswith("layers")][name] = parameter
    return TrainingRun(*groups, seed=3, average_decay=0.9, largest_norm=0.5, model=model)


def train(model: Network, run: TrainingRun, until: int) -> None:
    """Steps of two micro-batches, which two processes share between them."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    while run.total_steps < until:
        batches = torch.randn((PARTS, 4, 5), generator=run.generator)
        own = batches[process_index() :: processes]
        losses = []
        for index, batch in enumerate(own):
            loss = model.loss(batch)
            run.add_gradients(loss, len(own), index == len(own) - 1)
            losses.append(loss.detach())
        run.take_step(1e-2, 2e-2)
        run.history.append(float(sum_over_processes(torch.stack(losses).sum()) / PARTS))


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def describe(model: Network, run: TrainingRun) -> dict[str, Any]:
    """All that a run is, unsharded."""
    tensors = {name: full(tensor).clone() for name, tensor in run._tensors().items()}
    weights = gather_weights(model)
    return {
        "tensors": tensors, "weights": {name: tensor.clone() for name, tensor in weights.items()},
        "generator": run.generator.get_state(), "history": list(run.history), "norm": run.gradient_norm.clone(),
        "counts": (run.phase, run.step, run.total_steps),
    }  # fmt: skip


def train_for(folder: Path, until: int, save_at: int | None = None) -> dict[str, Any]:
    """Restore what there is, train, perhaps save on the way."""
    model = place()
    run = start(model)
    run.restore(folder)
    restored = describe(model, run)
    if save_at is not None:
        train(model, run, save_at)
        run.save(folder)
    train(model, run, until)
    return {"restored": restored, **describe(model, run)}


def _enter(rank: int, folder: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.save(function(*arguments), folder / f"result-{rank}")
    dist.destroy_process_group()


def on_two(folder: Path, function: Callable, *arguments: Any) -> dict[str, Any]:
    """What the first of two processes makes of a function."""
    folder.mkdir()
    torch.multiprocessing.spawn(_enter, (folder, function, arguments), nprocs=2)
    return torch.load(folder / "result-0")


def assert_same(a: dict[str, Any], b: dict[str, Any], exactly: bool = True) -> None:
    tolerance = {"atol": 0, "rtol": 0} if exactly else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(a["tensors"], b["tensors"], **tolerance)
    torch.testing.assert_close(a["weights"], b["weights"], **tolerance)
    torch.testing.assert_close(a["history"], b["history"], **tolerance)
    assert torch.equal(a["generator"], b["generator"])
    assert a["counts"] == b["counts"]


def test_resumed_equals_uninterrupted_on_one_process(tmp_path: Path) -> None:
    whole = train_for(tmp_path / "a", STEPS)
    train_for(tmp_path / "b", 3, save_at=2)
    assert_same(train_for(tmp_path / "b", STEPS), whole)


def test_two_processes_equal_one_and_exchange_checkpoints(tmp_path: Path) -> None:
    one = train_for(tmp_path / "one", STEPS, save_at=2)
    two = on_two(tmp_path / "1", train_for, tmp_path / "two", STEPS, 2)
    assert_same(one, two, exactly=False)
    torch.testing.assert_close(one["norm"], two["norm"])
    assert_same(on_two(tmp_path / "2", train_for, tmp_path / "two", STEPS), two)

    saved_by_one = train_for(tmp_path / "one", 2)
    moved = on_two(tmp_path / "3", train_for, tmp_path / "one", STEPS)
    assert_same(moved["restored"], saved_by_one)
    assert_same(moved, one, exactly=False)
    saved_by_two = on_two(tmp_path / "4", train_for, tmp_path / "two", 2)
    moved = train_for(tmp_path / "two", STEPS)
    assert_same(moved["restored"], saved_by_two)
    assert_same(moved, two, exactly=False)


def train_with_a_part_frozen(precision: str) -> dict[str, Any]:
    """Steps in which the layers first are frozen and then are not."""
    model = place(precision)
    run = start(model)
    before = describe(model, run)["weights"]
    frozen = {}
    for step in range(3):
        model.layers.requires_grad_(step > 0)
        with autocast("cpu", precision):
            loss = model.loss(torch.randn((4, 5), generator=run.generator))
        run.update(loss, 1e-2, 1e-2)
        if step == 0:
            frozen = describe(model, run)["weights"]
    after = describe(model, run)["weights"]
    changed = {
        name: [not torch.equal(weights[name], value) for weights in (frozen, after)] for name, value in before.items()
    }
    types = {p.dtype for p in model.parameters()} | {value.dtype for value in run.averages.values()}
    return {"changed": changed, "types": types, "loss": loss.item()}


def record_types(precision: str) -> dict[str, Any]:
    """In which type weights are used."""
    model, seen = place(precision), {}

    def record(layer: nn.Module, _: Any) -> None:
        seen["layer"] = layer.weight.dtype

    model.layers[0].register_forward_pre_hook(record)
    model.frozen.register_forward_pre_hook(lambda *_: seen.update(scale=model.scale.dtype))
    with autocast("cpu", precision):
        model.loss(torch.zeros(1, 5))
    return seen


def count_builds() -> list[dict[bool, int]]:
    """For each process, how often it built a model with weights and one without."""
    calls: dict[bool, int] = {}

    def build(with_weights: bool) -> Network:
        calls[with_weights] = calls.get(with_weights, 0) + 1
        network = Network()
        assert network.scale.is_meta != with_weights
        return network

    place_model(build, lambda model: model.layers, ["loss"], "cpu", "float32")
    all_calls: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_calls, calls)
    return all_calls


def look_at_two_processes() -> dict[str, Any]:
    return {
        "frozen": train_with_a_part_frozen("bfloat16"),
        "types": {precision: record_types(precision) for precision in ("float32", "bfloat16")},
        "builds": count_builds(),
    }


def test_two_processes_freeze_and_halve_and_read_weights_once(tmp_path: Path) -> None:
    two = on_two(tmp_path / "two", look_at_two_processes)
    one = {precision: train_with_a_part_frozen(precision) for precision in ("float32", "bfloat16")}
    for found in (*one.values(), two["frozen"]):
        assert found["changed"]["layers.1.weight"] == [False, True]
        assert found["changed"]["scale"] == [True, True]
        assert found["changed"]["frozen.weight"] == [False, False]
        assert found["types"] == {torch.float32}
    assert two["frozen"]["loss"] == pytest.approx(one["bfloat16"]["loss"], rel=1e-2)
    assert one["bfloat16"]["loss"] != one["float32"]["loss"]
    assert two["types"]["bfloat16"] == {"layer": torch.bfloat16, "scale": torch.float32}
    assert two["types"]["float32"] == {"layer": torch.float32, "scale": torch.float32}
    assert two["builds"] == [{True: 1, False: 1}, {False: 1}]


def test_several_losses_a_step_equal_their_mean() -> None:
    runs = []
    for apart in (True, False):
        model = place()
        run = start(model)
        for _ in range(3):
            batches = torch.randn((3, 4, 5), generator=run.generator)
            if apart:
                for index, batch in enumerate(batches):
                    run.add_gradients(model.loss(batch), 3, index == 2)
                run.take_step(1e-2, 1e-3)
            else:
                run.update(torch.stack([model.loss(batch) for batch in batches]).mean(), 1e-2, 1e-3)
        runs.append(run)
    for a, b in zip(runs[0].parameters.values(), runs[1].parameters.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_phase_starts_with_a_fresh_optimizer_and_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    model = place()
    run = start(model)
    run.update(model.loss(torch.ones(1, 5)), 1e-2, 1e-2)
    run.save(tmp_path)
    run.begin_phase(1)
    assert (run.phase, run.step, run.total_steps, dict(run.optimizer.state)) == (1, 0, 1, {})
    run.save(tmp_path)
    run.use_averages()
    other = place()
    again = start(other)
    assert again.restore(tmp_path)
    assert (again.phase, again.step, again.total_steps, dict(again.optimizer.state)) == (1, 0, 1, {})
    assert not torch.equal(other.scale, model.scale)
    assert torch.equal(again.averages["scale"], model.scale)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001-001"]


def test_a_killed_save_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    whole = train_for(tmp_path / "whole", STEPS)
    train_for(tmp_path / "killed", 2, save_at=2)
    for moment in ("dcp.save", "Path.rename"):
        context = torch.multiprocessing.get_context("spawn")
        process = context.Process(target=die_while_saving, args=(tmp_path / "killed", moment))
        process.start()
        process.join()
        assert process.exitcode == 9
        newest = newest_checkpoint(tmp_path / "killed")
        assert newest is not None
        assert newest.name == "00000002-000"
        assert len(list((tmp_path / "killed").iterdir())) == 2
    assert_same(train_for(tmp_path / "killed", STEPS, save_at=3), whole)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["00000003-000"]


def die_while_saving(folder: Path, moment: str) -> None:
    """End this process, as a kill would, within the next save."""
    from torch.distributed.checkpoint import FileSystemWriter

    if moment == "dcp.save":
        FileSystemWriter.finish = lambda *_, **__: os._exit(9)
    else:
        Path.rename = lambda *_: os._exit(9)
    train_for(folder, 3, save_at=3)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert not start(place()).restore(tmp_path / "none")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1.0, 1.0, 1.0]), ("cosine", [0.5, 0.853553, 0.5, 0.146447])],
)
def test_learning_rates(schedule: Any, expected: list[float]) -> None:
    rates = [schedule_learning_rate(1.0, step, 4, schedule, 2) for step in range(4)]
    assert rates == pytest.approx(expected, abs=1e-6)
