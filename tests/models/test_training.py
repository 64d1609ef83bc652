"""A training run on one process and on two: steps, restarts, and checkpoints that move between them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from models.processes import gather_weights, place_model, process_index, sum_over_processes
from models.training import TrainingRun

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
