"""Units on Ray: a pool of actors that outlive a stage, so models' libraries are imported once.

The one file, besides the training launcher, that knows Ray. Units are handed out one at a time to idle actors, which
needs no scheduling by Ray beyond the actors themselves and so cannot deadlock on a small machine.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.engine import UnitProgress, Work
from stages.errors import ComputationError
from stages.spec import StageConfig, StageSpec
from stages.worker import Unit, UnitResult, Worker, WorkerSettings
from storage.errors import StoreFullError, StoreUnavailableError

log = logging.getLogger(__name__)

MAX_DEATHS = 3
POLL_S = 0.5
OBJECT_STORE_BYTES = 200_000_000


class ProgressBoard:
    """An actor that holds how far each running unit is, so that the driver can show it."""

    def __init__(self) -> None:
        self._latest: dict[tuple[str, int], tuple[int, int, str]] = {}

    def post(self, key: tuple[str, int], done: int, total: int, message: str) -> None:
        """A worker says how far it is."""
        self._latest[key] = (done, total, message)

    def read(self) -> dict[tuple[str, int], tuple[int, int, str]]:
        """The latest word on every unit."""
        return dict(self._latest)

    def clear(self, key: tuple[str, int]) -> None:
        """Forget a unit that has ended."""
        self._latest.pop(key, None)


class RemoteWorker:
    """The actor around a `Worker`; posts progress at most twice a second."""

    def __init__(self, settings: WorkerSettings, board: Any) -> None:
        self._worker, self._board = Worker(settings), board

    def run(self, spec: StageSpec, config: StageConfig, unit: Unit) -> UnitResult:
        """See `Worker.run`."""
        last = 0.0

        def post(done: int, total: int, message: str) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= POLL_S:
                last = now
                self._board.post.remote((unit.subject, unit.index), done, total, message)

        return self._worker.run(spec, config, unit, post)


class RayExecutor:
    """Runs units on Ray actors.

    Starts a Ray of its own on this machine, or joins the cluster at `address`; `close` ends only what it started.

    Args:
        settings: For the workers.
        address: A cluster's `host:port`; None starts a local Ray.
        cpus: Cores for a local Ray; None takes what this process may use.
        max_concurrent: Most units at once; None takes what the cores allow.
        temp_dir: Folder of a local Ray's sockets and logs; short, because socket paths are bounded.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        address: str | None,
        cpus: int | None,
        max_concurrent: int | None = None,
        temp_dir: Path | None = None,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 a busy desktop starves the workers
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Threads that spin while they wait for each other make a busy machine ten times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import ray

        self._ray, self._settings = ray, settings
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
        if address:
            ray.init(address=address, **quiet)
        else:
            local = {"num_cpus": cpus or len(os.sched_getaffinity(0)), "object_store_memory": OBJECT_STORE_BYTES}
            folder = {"_temp_dir": str(temp_dir)} if temp_dir else {}
            ray.init(address="local", include_dashboard=False, **local, **folder, **quiet)
        self._total, self._max_concurrent = ray.cluster_resources(), max_concurrent
        self._board = ray.remote(ProgressBoard).options(num_cpus=0).remote()
        self._pool: list[Any] = []
        self._shape: tuple[float, float] | None = None

    def close(self) -> None:
        """End the actors and leave, or stop, Ray."""
        self._release()
        self._ray.shutdown()

    def run(
        self, spec: StageSpec, config: StageConfig, units: Sequence[tuple[Work, Unit]], progress: UnitProgress
    ) -> Iterator[tuple[Work, Unit, UnitResult, int]]:
        """See `Executor.run`. A unit whose actor dies is tried again elsewhere, and given up after three deaths."""
        if not units:
            return
        self._fit(spec, len(units))
        waiting = [(work, unit, 1) for work, unit in reversed(units)]
        idle, running = list(self._pool), {}
        total, finished = sum(unit.items for _, unit in units), 0.0
        while waiting or running:
            while idle and waiting:
                work, unit, attempt = waiting.pop()
                actor = idle.pop()
                running[actor.run.remote(spec, work.config, unit)] = (actor, work, unit, attempt)
            ready, _ = self._ray.wait(list(running), num_returns=1, timeout=POLL_S)
            for future in ready:
                actor, work, unit, attempt = running.pop(future)
                try:
                    result = self._ray.get(future)
                except self._ray.exceptions.RayActorError as error:
                    idle.append(self._replace(actor))
                    if attempt < MAX_DEATHS:
                        log.warning("%s: worker died on %s unit %d", spec.name, unit.subject, unit.index)
                        waiting.append((work, unit, attempt + 1))
                        continue
                    result = UnitResult(error=f"killed its worker {MAX_DEATHS} times: {_last_line(error)}")
                except self._ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, StoreFullError | StoreUnavailableError):
                        raise error.cause from None
                    raise ComputationError(f"{spec.name}: the worker failed: {error.cause}") from error
                else:
                    idle.append(actor)
                self._board.clear.remote((unit.subject, unit.index))
                finished += unit.items
                yield work, unit, result, attempt
            self._show(running, finished, total, progress)

    def _show(self, running: dict, finished: float, total: float, progress: UnitProgress) -> None:
        latest = self._ray.get(self._board.read.remote())
        done, message = finished, ""
        for _, _, unit, _ in running.values():
            if (unit.subject, unit.index) in latest:
                at, of, text = latest[unit.subject, unit.index]
                done += unit.items * at / max(of, 1)
                message = text or message
        progress(done, total, message)

    def _fit(self, spec: StageSpec, units: int) -> None:
        """Have a pool of actors of the shape that the stage asks for, as far as the cluster has it."""
        cpus = min(spec.cpus, self._total.get("CPU", 1.0))
        gpus = min(spec.gpus, self._total.get("GPU", 0.0))
        room = int(self._total.get("CPU", 1.0) // cpus)
        if gpus:
            room = min(room, int(self._total["GPU"] // gpus))
        room = min(room, self._max_concurrent or room)
        if self._shape != (cpus, gpus):
            self._release()
            self._shape = (cpus, gpus)
        while len(self._pool) < max(1, min(room, units)):
            self._pool.append(self._start())

    def _start(self) -> Any:
        cpus, gpus = self._shape or (1.0, 0.0)
        actor = self._ray.remote(RemoteWorker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
        return actor.remote(self._settings, self._board)

    def _replace(self, dead: Any) -> Any:
        self._pool.remove(dead)
        self._pool.append(self._start())
        return self._pool[-1]

    def _release(self) -> None:
        for actor in self._pool:
            self._ray.kill(actor)
        self._pool = []


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
