"""What this machine has, what a profile needs, what is missing and how to get it."""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.needs import CACHE_DIR, Footprints, examine_needs, measure_flops, read_rates
from flows.profile import ExplainedProfile, Profile
from flows.stage_loads import stage_loads
from flows.workspace import Workspace
from models.weights import TABLE, missing_files
from stages.errors import MoviedreamerError
from storage.errors import StorageError

MIN_FREE_BYTES = 5 * 2**30
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "prefect",
    "ray",
    "webdataset",
    "pyarrow",
    "av",
    "onnxruntime",
    "dlib-bin",
)


def examine(
    profile: str,
    workspace: Path,
    keyframes: int | None = None,
    overrides: tuple[str, ...] = (),
    report: Callable[[str], None] = lambda line: None,
    cache: Path = CACHE_DIR,
) -> list[dict[str, Any]]:
    """One row a check: `check, ok, found, remedy`, and for a stage with heavy networks the numbers of its `Need`.

    Args:
        profile: Its name or file.
        workspace: Its folder.
        keyframes: How many there are to work on; with it, times are told.
        overrides: Settings in place of the profile's.
        report: Called with a line before something that takes seconds.
        cache: Folder of footprints and rates.
    """
    settings = ExplainedProfile(profile, overrides).profile
    rows = [
        _row("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or later"),
        _row("cores", True, str(len(os.sched_getaffinity(0))), ""),
        _disk(workspace),
        _workspace(workspace),
    ]
    rows += [_package(name) for name in (*PACKAGES, *_optional_packages(settings))]
    rows.append(_row("accelerator", True, _accelerator(), ""))
    for name in settings.weights():
        missing = missing_files(name, settings.engine.weights_dir)
        found = "missing" if missing else "present"
        about, remedy = "yours", "correct the setting, or put them there"
        if weight := TABLE.get(name):
            about = f"{weight.licence}; {weight.size_mb:,.0f} MB; {weight.carrier}"
            remedy = f"moviedreamer weights pull {name}"
        rows.append(_row(f"weights {name}", not missing, f"{found} ({about})", remedy))
    server = os.environ.get("PREFECT_API_URL", "none: a temporary one is started for each run")
    rows.append(_row("prefect server", True, server.rpartition("@")[2], ""))
    rows += _needs(settings, keyframes, report, cache)
    return rows


def _needs(
    settings: Profile, keyframes: int | None, report: Callable[[str], None], cache: Path
) -> Iterator[dict[str, Any]]:
    """A row for each stage with networks that are large enough to ask after."""
    if not stage_loads(settings):
        return
    import torch

    device, memory = "cpu", None
    if torch.cuda.is_available():
        device, memory = "cuda", torch.cuda.get_device_properties(0).total_memory
    rates = read_rates(torch.cuda.get_device_name(0) if memory else "cpu", cache)
    footprints = Footprints(cache / "footprints.json", report)
    speed = functools.cache(lambda: measure_flops(device))
    for need in examine_needs(settings, keyframes, memory, footprints, rates, speed):
        yield _row(f"stage {need.stage}", not need.remedy, need.describe(), need.remedy) | {"needs": asdict(need)}


def _optional_packages(settings: Profile) -> list[str]:
    """Packages that only some settings need."""
    wanted = {
        "insightface": settings.faces.models.uses_insightface(),
        "groundingdino-py": settings.people.detector == "grounding_dino_original",
    }
    return [name for name, used in wanted.items() if used]


def _row(check: str, ok: bool, found: str, remedy: str) -> dict[str, Any]:
    return {"check": check, "ok": ok, "found": found, "remedy": "" if ok else remedy}


def _disk(workspace: Path) -> dict[str, Any]:
    folder = next(p for p in (workspace.absolute(), *workspace.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    found = f"{free / 2**30:.1f} GiB free at {folder}" + ("" if writable else ", not writable")
    remedy = f"free some space (at least {MIN_FREE_BYTES // 2**30} GiB) or choose another --workspace"
    return _row("disk", free >= MIN_FREE_BYTES and writable, found, remedy)


def _workspace(folder: Path) -> dict[str, Any]:
    """Whether catalog and store answer; a bucket's keys and a database's password are tried by that."""
    if not Workspace.exists(folder):
        return _row("workspace", True, "none yet", "")
    try:
        opened = Workspace.open(folder)
        films = len(opened.catalog.films())
        opened.store.ping()
        opened.catalog.close()
    except (MoviedreamerError, StorageError) as error:
        return _row("workspace", False, "does not answer", str(error))
    return _row("workspace", True, f"{films} films, objects in {opened.store.uri}", "")


def _package(name: str) -> dict[str, Any]:
    try:
        return _row(name, True, importlib.metadata.version(name), "")
    except importlib.metadata.PackageNotFoundError:
        return _row(name, False, "missing", "install the project again: make setup")


def _accelerator() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none: everything runs on the CPU"
