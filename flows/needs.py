"""What the heavy networks of a profile need, stage by stage: accelerator memory, arithmetic, and time.

Memory and arithmetic come from runs on fake tensors (`models.footprint`), which are kept, since they take seconds each.
Time comes from rates that `benchmarks/rates.py` measured on this device, else from arithmetic and the rate at which
this machine multiplies matrices: no network is faster than that.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.profile import Profile
from flows.stage_loads import StageLoad, stage_loads

if TYPE_CHECKING:
    from models.footprint import Footprint
    from models.workloads import Workload

CACHE_DIR = Path("~/.cache/moviedreamer").expanduser()
MOST_PROCESSES = 1024


@dataclass(frozen=True)
class Need:
    """What a stage needs.

    Attributes:
        stage: Its name.
        networks: Names of what runs.
        parameters: Of all its networks.
        memory_bytes: Of each accelerator.
        unit: `keyframe` or `step`.
        flops: Floating-point operations a unit, over all accelerators.
        units: How many there are; None where no count of keyframes is given.
        hours: For all of them; None likewise.
        measured: Whether all of the time follows from measured rates; if not, it is a lower bound.
        remedy: What to do where an accelerator's memory is too small.
    """

    stage: str
    networks: list[str]
    parameters: int
    memory_bytes: int
    unit: str
    flops: float
    units: int | None
    hours: float | None
    measured: bool
    remedy: str = ""

    def describe(self) -> str:
        """In one line."""
        parts = [
            f"{len(self.networks)} network{'s' * (len(self.networks) > 1)}, {self.parameters / 1e9:.2f}B parameters",
            f"{self.memory_bytes / 2**30:.1f} GiB of accelerator memory",
            f"{self.flops / 1e12:,.4g} TFLOP a {self.unit}",
        ]
        if self.hours is not None:
            bound = "" if self.measured else "at least "
            hours = f"{self.hours:,.0f}" if self.hours >= 10 else f"{self.hours:.2g}"
            parts.append(f"{bound}{hours} h for {self.units:,} {self.unit}s")
        return ", ".join(parts)


class Footprints:
    """Footprints of workloads, kept in a file so that each is measured once.

    Args:
        path: The file.
        report: Called with a line before something is measured.
    """

    def __init__(self, path: Path, report: Callable[[str], None] = lambda line: None) -> None:
        self._path, self._report = path, report

    def __call__(self, workload: "Workload") -> "Footprint":
        from models.footprint import Footprint

        key = f"{workload.name} x{workload.count} {workload.settings} {self._version}"
        found = self._read()
        if key not in found:
            self._report(f"measuring {workload.name} on fake tensors")
            kept = {name: value for name, value in found.items() if name.endswith(self._version)}
            found = kept | {key: asdict(workload.footprint())}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(found, indent=1) + "\n")
        return Footprint(**found[key])

    @cached_property
    def _version(self) -> str:
        """Of all that a footprint follows from: the libraries, and our own models."""
        import models

        digest = hashlib.sha256()
        for path in sorted(Path(models.__path__[0]).glob("*.py")):
            digest.update(path.read_bytes())
        for name in ("torch", "transformers", "diffusers"):
            digest.update(importlib.metadata.version(name).encode())
        return digest.hexdigest()[:12]

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}


def examine_needs(
    profile: Profile,
    keyframes: int | None,
    accelerator_bytes: int | None,
    footprints: Callable[["Workload"], "Footprint"],
    rates: dict[str, float],
    flops_per_s: Callable[[], float],
) -> Iterator[Need]:
    """What each stage with heavy networks needs, in the order of the stages.

    Args:
        profile: The settings.
        keyframes: How many there are to work on, or to make.
        accelerator_bytes: Memory of this machine's accelerator; None where there is none.
        footprints: Gives a workload's.
        rates: Measured seconds a unit, by workload.
        flops_per_s: Gives the rate of matrix products on this machine; asked for only where a rate is missing.
    """
    for stage in stage_loads(profile):
        sizes = [footprints(load.workload) for load in stage.loads]
        need = _measure_stage(stage, sizes, keyframes, rates, flops_per_s)
        if accelerator_bytes is not None and need.memory_bytes > accelerator_bytes:
            need = replace(need, remedy=_find_remedy(stage, sizes, accelerator_bytes))
        yield need


def _measure_stage(
    stage: StageLoad,
    sizes: list["Footprint"],
    keyframes: int | None,
    rates: dict[str, float],
    flops_per_s: Callable[[], float],
) -> Need:
    flops = [load.units * size.flops / load.workload.count for load, size in zip(stage.loads, sizes, strict=True)]
    units = keyframes if stage.steps is None else stage.steps
    names = [load.workload.name for load in stage.loads]
    measured = all(name in rates for name in names)
    hours = None
    if units is not None:
        seconds = sum(
            load.units * rates[load.workload.name] if load.workload.name in rates else work / flops_per_s()
            for load, work in zip(stage.loads, flops, strict=True)
        )
        hours = units * seconds / 3600 / (1 if stage.training is None else stage.training.processes)
    networks = {load.workload.network or load.workload.name: s for load, s in zip(stage.loads, sizes, strict=True)}
    parameters = sum(size.parameters for size in networks.values())
    if stage.training is None:
        memory = sum(size.parameter_bytes for size in networks.values()) + max(size.working_bytes for size in sizes)
    else:
        memory = max(_training_memory(size, stage.training.processes) for size in sizes)
    unit = "keyframe" if stage.steps is None else "step"
    return Need(stage.stage, list(networks), parameters, memory, unit, sum(flops), units, hours, measured)


def _training_memory(size: "Footprint", processes: int, share: float = 1.0) -> int:
    """Of each process, with a share of the micro-batch's activations."""
    from models.footprint import sharded_bytes

    gathered = size.gathered_bytes if processes > 1 else 0
    return sharded_bytes(size.state_bytes, gathered, round(size.working_bytes * share), processes)


def _find_remedy(stage: StageLoad, sizes: list["Footprint"], room: int) -> str:
    """The smallest change of settings under which the stage fits into the memory that there is."""
    if stage.training is None:
        batch = {"captions": "concurrency", "scripts": "concurrency", "render": "batch_pictures",
                 "features": "batch_pictures"}.get(stage.stage)  # fmt: skip
        smaller = f"lower {stage.stage}.{batch}, or " if batch else ""
        return f"{smaller}run it on an accelerator with more memory than {room / 2**30:.0f} GiB"
    now = stage.training.micro_batches
    processes = stage.training.processes
    while processes <= MOST_PROCESSES:
        for parts in (parts for parts in range(now, stage.batch + 1) if stage.batch % parts == 0):
            if parts % processes == 0 and max(_training_memory(s, processes, now / parts) for s in sizes) <= room:
                return _name_settings(stage, processes, parts)
        processes += 1
    fewest = next((p for p in range(1, MOST_PROCESSES) if _fits(sizes, p, now / stage.batch, room)), None)
    if fewest is None:
        return f"train it on accelerators with more memory than {room / 2**30:.0f} GiB"
    return f"train it on at least {fewest} accelerators: set {stage.stage}.processes, and raise its batch as far"


def _fits(sizes: list["Footprint"], processes: int, share: float, room: int) -> bool:
    return max(_training_memory(size, processes, share) for size in sizes) <= room


def _name_settings(stage: StageLoad, processes: int, parts: int) -> str:
    wanted = {"processes": processes, "micro_batches": parts}
    changed = [name for name in wanted if wanted[name] != getattr(stage.training, name)]
    return "set " + " and ".join(f"{stage.stage}.{name}={wanted[name]}" for name in changed)


def read_rates(device: str, folder: Path) -> dict[str, float]:
    """Seconds a unit by workload, as `benchmarks/rates.py` measured them on a device; none where it did not run."""
    path = rates_path(device, folder)
    try:
        return {name: row["seconds_per_unit"] for name, row in json.loads(path.read_text())["networks"].items()}
    except (OSError, ValueError, KeyError):
        return {}


def rates_path(device: str, folder: Path) -> Path:
    """Where rates on a device are kept."""
    return folder / "rates" / f"{''.join(c if c.isalnum() else '-' for c in device)}.json"


def measure_flops(device: str, seconds: float = 0.3) -> float:
    """Floating-point operations a second of large matrix products here: in half precision on an accelerator."""
    import torch

    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    left = torch.randn(side, side, device=device, dtype=dtype)

    def multiply() -> float:
        started = time.perf_counter()
        result = left @ left
        result[0, 0].item()  # waits for the accelerator
        return time.perf_counter() - started

    best, until = multiply(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, multiply())
    return 2 * side**3 / best
