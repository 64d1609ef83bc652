"""Units on Ray: a pool of actors that outlive a stage, so models' libraries are imported once.

The one file, besides the training launcher, that knows Ray. Units are handed out one at a time to idle actors, which
needs no scheduling by Ray beyond the actors themselves and so cannot deadlock on a small machine.
"""

import logging
import math
import os
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stages.engine import UnitProgress, Work, group_units
from stages.errors import ComputationError
from stages.spec import StageConfig, StageSpec
from stages.worker import Unit, UnitResult, Worker, WorkerSettings
from storage.errors import StoreFullError, StoreUnavailableError

log = logging.getLogger(__name__)

MAX_DEATHS = 3
POLL_S = 0.5
ITEM_LIMIT_S = 3600.0
"""Time limit of a unit of an item stage, where its settings name none."""
OBJECT_STORE_BYTES = 200_000_000
LAUNCHER_CPUS = 0.1
"""Of a job whose work is done in processes that it starts."""


class Board:
    """An actor beside the driver: how far each hand-out of units is, and which of them no longer count."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[int, int, str]] = {}
        self._revoked: set[str] = set()

    def revoke(self, token: str) -> None:
        """What was handed out under this token is given to another worker."""
        self._revoked.add(token)

    def holds(self, token: str) -> bool:
        """Whether a worker may still store what it made of the units that it was handed under this token."""
        return token not in self._revoked

    def post(self, token: str, done: int, total: int, message: str) -> None:
        """A worker says how far it is."""
        self._latest[token] = (done, total, message)

    def read(self) -> dict[str, tuple[int, int, str]]:
        """The latest word on every hand-out."""
        return dict(self._latest)

    def clear(self, token: str) -> None:
        """Forget a hand-out that has ended."""
        self._latest.pop(token, None)


class RemoteWorker:
    """The actor around a `Worker`; posts progress at most twice a second."""

    def __init__(self, settings: WorkerSettings, board: Any) -> None:
        self._worker, self._board = Worker(settings), board

    def run(self, spec: StageSpec, config: StageConfig, units: Sequence[Unit], token: str) -> list[UnitResult]:
        """See `Worker.run_together`. A worker that cannot reach the board stores nothing."""
        import ray

        last = 0.0

        def post(done: int, total: int, message: str) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= POLL_S:
                last = now
                self._board.post.remote(token, done, total, message)

        return self._worker.run_together(spec, config, units, post, lambda: ray.get(self._board.holds.remote(token)))


def start_ray(address: str | None, cpus: int | None) -> None:
    """Join the cluster at `address`, or start a Ray on this machine; nothing where that was done before.

    Args:
        address: A cluster's `host:port`; None for a Ray of our own.
        cpus: Cores for that; None takes what this process may use.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 a busy desktop starves the workers
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Threads that spin while they wait for each other make a busy machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    if address:
        ray.init(address=address, **quiet)
        return
    local: dict[str, Any] = {"num_cpus": cpus or len(os.sched_getaffinity(0))}
    local["object_store_memory"] = OBJECT_STORE_BYTES
    if " " in sys.executable:  # Ray Train's workers are started by a shell line in which Ray quotes nothing
        local["runtime_env"] = {"py_executable": shlex.quote(sys.executable)}
    ray.init(address="local", include_dashboard=False, **local, **quiet)


class RayExecutor:
    """Runs units on Ray actors.

    Starts a Ray of its own on this machine, or joins the cluster at `address`; `close` ends what was started here.

    Args:
        settings: For the workers.
        address: A cluster's `host:port`; None starts a local Ray.
        cpus: Cores for a local Ray; None takes what this process may use.
        max_concurrent: Most units at once; None takes what the cores allow.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        address: str | None,
        cpus: int | None,
        max_concurrent: int | None = None,
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._settings = ray, settings
        start_ray(address, cpus)
        self._total, self._max_concurrent = ray.cluster_resources(), max_concurrent
        beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=beside).remote()
        self._pool: list[Any] = []
        self._shape: tuple[float, float] | None = None

    def close(self) -> None:
        """End the actors and leave, or stop, Ray."""
        self._release()
        self._ray.shutdown()

    def run(
        self, spec: StageSpec, config: StageConfig, units: Sequence[tuple[Work, Unit]], progress: UnitProgress
    ) -> Iterator[tuple[Work, Unit, UnitResult, int]]:
        """See `Executor.run`.

        A unit whose worker dies, or is stopped because it took longer than the stage's time limit, is tried again
        elsewhere, and given up after three times. Units are given only to workers that have started: after the loss of
        a host the worker in place of the lost one may find room nowhere.
        """
        if not units:
            return
        cpus, gpus, room = self._room_for(spec, config)
        groups = group_units(units, room)
        self._fit(cpus, gpus, min(room, len(groups)))
        waiting = [(group, 1) for group in reversed(groups)]
        starting = {actor.__ray_ready__.remote(): (actor, 1) for actor in self._pool}
        idle: list[Any] = []
        running: dict[Any, _HandedOut] = {}
        total, finished = sum(unit.items for _, unit in units), 0.0
        while waiting or running:
            while idle and waiting:
                out = _HandedOut(idle.pop(), *waiting.pop(), uuid.uuid4().hex, time.monotonic())
                running[out.actor.run.remote(spec, out.config, [unit for _, unit in out.group], out.token)] = out
            ready, _ = self._ray.wait([*running, *starting], num_returns=1, timeout=POLL_S)
            idle += [actor for future in ready if future in starting for actor in self._welcome(spec, starting, future)]
            ended = [future for future in ready if future in running]
            for future in [*ended, *self._find_late(spec, running, ended)]:
                out = running.pop(future)
                results = self._receive(spec, future, out) if future in ended else self._stop(spec, out)
                if out.actor in self._pool:
                    idle.append(out.actor)
                else:
                    self._add(starting)
                if results is None:
                    waiting += [((pair,), out.attempt + 1) for pair in reversed(out.group)]
                    continue
                self._board.clear.remote(out.token)
                finished += out.items
                for (work, unit), result in zip(out.group, results, strict=True):
                    yield work, unit, result, out.attempt
            self._show(running, finished, total, progress)

    def _receive(self, spec: StageSpec, future: Any, out: "_HandedOut") -> list[UnitResult] | None:
        """What came of units; None where each of them is to be tried again by itself.

        Raises:
            StoreFullError, StoreUnavailableError: The worker met what every other would meet too.
            ComputationError: The worker itself is broken.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(future)
        except errors.RayTaskError as error:
            if isinstance(error.cause, StoreFullError | StoreUnavailableError):
                raise error.cause from None
            if not isinstance(error, errors.RayActorError | errors.OutOfMemoryError):
                raise ComputationError(f"{spec.name}: the worker failed: {error.cause}") from error
            return self._take_back(spec, out, f"killed its worker: {_last_line(error)}")
        except errors.RayError as error:  # the worker, its node, or the way to it is gone
            return self._take_back(spec, out, f"killed its worker: {_last_line(error)}")

    def _find_late(self, spec: StageSpec, running: dict[Any, "_HandedOut"], ready: Sequence[Any]) -> list[Any]:
        now = time.monotonic()
        return [
            f
            for f, out in running.items()
            if f not in ready and now - out.since > len(out.group) * _time_limit(spec, out.config)
        ]

    def _stop(self, spec: StageSpec, out: "_HandedOut") -> list[UnitResult] | None:
        limit = _time_limit(spec, out.config)
        return self._take_back(spec, out, f"took longer than its time limit ({spec.name}.time_limit_s={limit:g})")

    def _take_back(self, spec: StageSpec, out: "_HandedOut", why: str) -> list[UnitResult] | None:
        """Make sure that the worker stores nothing any more; None where its units are to be tried again."""
        self._ray.get(self._board.revoke.remote(out.token))
        self._ray.kill(out.actor)
        self._pool.remove(out.actor)
        for _, unit in out.group:
            log.warning("%s: %s unit %d %s", spec.name, unit.subject, unit.index, why)
        if out.attempt < MAX_DEATHS:
            return None
        return [UnitResult(error=f"{why} (tried {MAX_DEATHS} times)")] * len(out.group)

    def _show(self, running: dict, finished: float, total: float, progress: UnitProgress) -> None:
        latest = self._ray.get(self._board.read.remote())
        done, message = finished, ""
        for out in running.values():
            if out.token in latest:
                at, of, text = latest[out.token]
                done += out.items * at / max(of, 1)
                message = text or message
        progress(done, total, message)

    def _room_for(self, spec: StageSpec, config: StageConfig) -> tuple[float, float, int]:
        """Cores and accelerators that an actor gets, of what the stage asks for, and how many actors have room."""
        cpus = min(spec.cpus, self._total.get("CPU", 1.0))
        gpus = min(spec.gpus_for(config), self._total.get("GPU", 0.0))
        if config.starts_processes():
            cpus, gpus = LAUNCHER_CPUS, 0.0
        room = int(self._total.get("CPU", 1.0) // cpus)
        if gpus:
            room = min(room, int(self._total["GPU"] // gpus))
        return cpus, gpus, max(1, min(room, self._max_concurrent or room))

    def _fit(self, cpus: float, gpus: float, actors: int) -> None:
        """Have a pool of at least so many actors of a shape."""
        if self._shape != (cpus, gpus):
            self._release()
            self._shape = (cpus, gpus)
        while len(self._pool) < actors:
            self._pool.append(self._start())

    def _start(self) -> Any:
        cpus, gpus = self._shape or (1.0, 0.0)
        actor = self._ray.remote(RemoteWorker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
        return actor.remote(self._settings, self._board)

    def _add(self, starting: dict[Any, tuple[Any, int]], attempt: int = 1) -> None:
        actor = self._start()
        self._pool.append(actor)
        starting[actor.__ray_ready__.remote()] = actor, attempt

    def _welcome(self, spec: StageSpec, starting: dict[Any, tuple[Any, int]], future: Any) -> list[Any]:
        """The actor, if it has started. One that could not is replaced, and done without after three times.

        Raises:
            ComputationError: There is no other.
        """
        actor, attempt = starting.pop(future)
        try:
            self._ray.get(future)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            self._pool.remove(actor)
            if attempt < MAX_DEATHS:
                self._add(starting, attempt + 1)
            elif not self._pool:
                raise ComputationError(f"{spec.name}: no worker could be started: {_last_line(error)}") from error
            return []
        return [actor]

    def _release(self) -> None:
        for actor in self._pool:
            self._ray.kill(actor)
        self._pool = []


@dataclass(frozen=True)
class _HandedOut:
    """Units in a worker's hands."""

    actor: Any
    group: tuple[tuple[Work, Unit], ...]
    attempt: int
    token: str
    since: float

    @property
    def config(self) -> StageConfig:
        """Of all of them."""
        return self.group[0][0].config

    @property
    def items(self) -> int:
        """In all of them."""
        return sum(unit.items for _, unit in self.group)


def _time_limit(spec: StageSpec, config: StageConfig) -> float:
    """Seconds that a unit may take."""
    return config.time_limit_s or (ITEM_LIMIT_S if spec.schema is not None else math.inf)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
