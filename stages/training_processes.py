"""One training job on several processes: on the Ray cluster of this process if there is one, else on this machine.

Each process runs the same function within a process group. They share a folder: what the first one returns, how far
it is, and what went wrong come back as small files in it. On several hosts the workspace's scratch folder, and the
weights, must therefore lie on a file system that all hosts share.
"""

import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from stages.errors import ComputationError
from stages.spec import Progress, no_progress

POLL_S = 0.5
PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: one of them reads whole models while the others wait."""
LAUNCHER_CPUS = 0.1
"""What the job itself takes of the cluster."""
RESULT, PROGRESS, ERROR = "result.json", "progress.json", "error-{}.json"
Body = Callable[[Progress], dict[str, Any]]
"""What each process runs; the first one's progress is shown and its (JSON) values are returned."""


@dataclass(frozen=True)
class _Task:
    """What is handed to each process."""

    body: Body
    processes: int
    folder: Path
    started_in: Path

    def run(self, index: int) -> None:
        """Within a process group: do the work, and leave what came of it in the folder."""
        if self.started_in.is_dir():
            os.chdir(self.started_in)  # Ray Train has its own; relative paths of weights and logs are meant from here
        if not self.folder.is_dir():
            raise ComputationError(
                f"a training process sees no {self.folder}: processes on several hosts need a workspace whose scratch "
                "folder lies on a file system that all hosts share"
            )
        try:
            result = self.body(self._show if index == 0 else no_progress)
        except Exception as error:
            own = type(error).__module__.startswith(("stages.", "models."))
            text = str(error) if own else f"{type(error).__name__}: {error}"
            self._write(ERROR.format(index), {"error": text, "time": time.time()})
            raise
        if index == 0:
            self._write(RESULT, result)

    def _show(self, done: int, total: int, message: str) -> None:
        path = self.folder / PROGRESS
        if done == total or not path.exists() or time.time() - path.stat().st_mtime >= POLL_S:
            self._write(PROGRESS, [done, total, message])

    def _write(self, name: str, values: Any) -> None:
        beside = self.folder / f".{name}"
        beside.write_text(json.dumps(values), encoding="utf-8")
        beside.replace(self.folder / name)


def run_processes(body: Body, processes: int, cpus: float, shared: Path, progress: Progress) -> dict[str, Any]:
    """Run a function in several processes that form a process group.

    Args:
        body: Can be pickled.
        processes: How many; each gets an accelerator of its own if there are enough.
        cpus: Cores for each, as far as there are so many.
        shared: A folder that all processes see.
        progress: Told what the first process tells.

    Returns:
        What the first process returned.

    Raises:
        ComputationError: A process failed.
    """
    launch = _run_on_ray if "ray" in sys.modules and sys.modules["ray"].is_initialized() else _run_on_this_machine
    with tempfile.TemporaryDirectory(dir=shared, prefix="processes-") as name:
        folder = Path(name)
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(folder, progress, over))
        watcher.start()
        try:
            launch(_Task(body, processes, folder, Path.cwd()), cpus)
        except ComputationError:
            raise
        except Exception as error:
            raise ComputationError(_first_error(folder) or f"a training process ended: {error}") from error
        finally:
            over.set()
            watcher.join()
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def _run_on_this_machine(task: _Task, cpus: float) -> None:
    import torch
    import torch.multiprocessing as multiprocessing

    found = torch.cuda.device_count()
    if 0 < found < task.processes:
        raise ComputationError(f"{task.processes} training processes on {found} accelerators: lower `processes`")
    threads = max(1, math.floor(min(cpus, len(os.sched_getaffinity(0)) / task.processes)))
    multiprocessing.spawn(_run_local, (task, threads, found > 0), nprocs=task.processes)


def _run_local(index: int, task: _Task, threads: int, accelerated: bool) -> None:
    """In a process of this machine."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    if accelerated:
        torch.cuda.set_device(index)
    meeting = f"file://{task.folder}/group"
    dist.init_process_group(
        "nccl" if accelerated else "gloo", init_method=meeting, rank=index, world_size=task.processes, timeout=PATIENCE
    )
    try:
        task.run(index)
    finally:
        dist.destroy_process_group()
    # All is done and written. Threads of the group that are still there when the interpreter is taken down abort it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _run_on_ray(task: _Task, cpus: float) -> None:
    import ray

    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise ComputationError(
            "training on several processes of a Ray cluster needs Ray Train: run `pip install pandas` on its hosts "
            f"({error})"
        ) from error

    total = ray.cluster_resources()
    accelerated = total.get("GPU", 0) > 0
    if accelerated and total["GPU"] < task.processes:
        raise ComputationError(
            f"{task.processes} training processes on {total['GPU']:g} accelerators: lower `processes`"
        )
    # Some of the cores are this job's own; what is asked for beyond what there is would be waited for without an end.
    share = math.floor(10 * (total["CPU"] - 2 * LAUNCHER_CPUS) / task.processes) / 10
    trainer = TorchTrainer(
        _run_ray,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if accelerated else "gloo", timeout_s=int(PATIENCE.total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=task.processes,
            use_gpu=accelerated,
            resources_per_worker={"CPU": max(0.1, min(cpus, share))},
        ),
        run_config=RunConfig(name="train", storage_path=str(task.folder / "ray")),
    )
    trainer.fit()


def _run_ray(config: dict[str, Any]) -> None:
    """In a worker of Ray Train."""
    import ray.train
    import ray.train.torch
    import torch

    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config["task"].run(ray.train.get_context().get_world_rank())


def _watch(folder: Path, progress: Progress, over: threading.Event) -> None:
    """Pass on what the first process tells."""
    last = None
    while not over.wait(POLL_S):
        path = folder / PROGRESS
        if path.exists() and (latest := path.read_text(encoding="utf-8")) != last:
            last = latest
            progress(*json.loads(latest))


def _first_error(folder: Path) -> str | None:
    """The error that came first: what the others tell is mostly that they lost this one."""
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(ERROR.format("*"))]
    return min(errors, key=lambda e: e["time"])["error"] if errors else None
