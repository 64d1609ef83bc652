"""One unit of one stage again, in this process and in the foreground: for a debugger. Nothing is committed."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flows.generate import GENERATE_STAGES
from flows.ingest import FILM_STAGES
from flows.pipeline import Pipeline
from flows.plan import STAGES
from flows.profile import Profile
from flows.train import TRAIN_STAGES
from flows.workspace import Workspace
from stages import baseline, features, score
from stages.engine import Engine, InlineExecutor
from stages.errors import UsageError
from stages.spec import StageSpec
from stages.worker import Unit, Worker, WorkerSettings
from storage.artifacts import read_rows
from storage.objects import ObjectStore, StoredFile

ALL_STAGES = (*STAGES, features.SPEC, *TRAIN_STAGES, score.SPEC, *GENERATE_STAGES, baseline.SPEC)


def replay(workspace: Workspace, profile: Profile, name: str, out: Path) -> dict[str, Any]:
    """Run a unit with the settings of the profile; its errors come through as they were raised.

    Args:
        workspace: Whose inputs.
        profile: The settings.
        name: `STAGE/SUBJECT` or `STAGE/SUBJECT#INDEX`. A unit in quarantine runs on exactly the inputs that it failed
            on; any other unit of a film stage on the film's current ones.
        out: Folder for its files.

    Returns:
        `stage`, `subject`, `unit`, `counts`, `seconds`, `rejects` (item, outcome, reason), `files` (paths).

    Raises:
        UsageError: There is no such unit.
    """
    spec, subject, index = parse_unit(name)
    config = profile.config(spec)
    unit = _failed_unit(workspace, spec, subject, index) or _current_unit(workspace, profile, spec, subject, index)
    with tempfile.TemporaryDirectory(prefix="moviedreamer-replay-") as folder:
        settings = WorkerSettings(workspace.store.uri, Path(folder), profile.engine.weights_dir)
        results = ObjectStore(f"{folder}/results")
        result = Worker(settings, results).compute(spec, config, unit)
        paths = []
        for stored in result.files:
            path = out / stored.name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(results.path(stored), path)
            paths.append(str(path))
        rejects = list(read_rows(results, [f for f in result.files if f.name.startswith("rejects-")]))
    return {
        "stage": spec.name,
        "subject": subject,
        "unit": index,
        "counts": result.counts,
        "seconds": round(result.seconds, 2),
        "rejects": rejects,
        "files": paths,
    }


def parse_unit(name: str) -> tuple[StageSpec, str, int]:
    """Stage, subject and index of a unit's name.

    Raises:
        UsageError: It is no unit's name.
    """
    match = re.fullmatch(r"(?P<stage>[a-z_]+)/(?P<subject>.+?)(#(?P<index>\d+))?", name)
    specs = {spec.name: spec for spec in ALL_STAGES}
    if not match or match["stage"] not in specs:
        raise UsageError(
            f"no unit {name!r}: expected STAGE/SUBJECT or STAGE/SUBJECT#INDEX, such as people/film.mp4#0, "
            f"with a stage of {', '.join(specs)}"
        )
    return specs[match["stage"]], match["subject"], int(match["index"] or 0)


def _failed_unit(workspace: Workspace, spec: StageSpec, subject: str, index: int) -> Unit | None:
    for row in workspace.catalog.failures():
        if (row["stage"], row["subject"], row["unit_index"]) == (spec.name, subject, index):
            facts = row["result"]
            inputs = {role: tuple(StoredFile(**f) for f in files) for role, files in facts["inputs"].items()}
            rows = (facts["source"],) if facts["source"] else ()
            return Unit(subject, index, row["fingerprint"], inputs, rows)
    return None


def _current_unit(workspace: Workspace, profile: Profile, spec: StageSpec, subject: str, index: int) -> Unit:
    catalog, source = workspace.catalog, None
    found = {kind: catalog.current(kind, subject) for kind in spec.inputs}
    if spec is FILM_STAGES[0] and (film := catalog.film(subject)):
        source = {"film_id": subject, "uri": film["uri"]}, film["digest"]
        found = {}
    if spec not in FILM_STAGES or not all(found.values()) or (spec is FILM_STAGES[0] and not source):
        raise UsageError(
            f"no unit {spec.name}/{subject} to replay: it is not in quarantine, and "
            + ("its inputs are not there" if spec in FILM_STAGES else "only stages of films can be replayed otherwise")
        )
    work = Pipeline(workspace, profile).work(spec, subject, {k: [a] for k, a in found.items() if a}, source)
    settings = WorkerSettings(workspace.store.uri, workspace.scratch, None)
    units = Engine(catalog, workspace.store, InlineExecutor(settings)).plan_units(work)
    if index >= len(units):
        raise UsageError(f"{spec.name}/{subject} has {len(units)} units: expected an index below {len(units)}")
    return units[index]
