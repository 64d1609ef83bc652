"""What happens inside a worker process: one unit of an item stage, or one job, from stored inputs to stored outputs.

Only small descriptors come in and go out; the bytes move between the worker and the object store.
"""

import errno
import itertools
import logging
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import ComputationError, FilmError, MoviedreamerError, StageError
from stages.reuse import Earlier, find_kept
from stages.spec import Fail, Ok, Outcome, Progress, Row, Skip, StageConfig, StageSpec, no_progress
from storage.artifacts import TableWriter, read_rows
from storage.errors import StorageError, StoreFullError, StoreUnavailableError
from storage.objects import ObjectStore, StoredFile, download

log = logging.getLogger(__name__)

MayStore = Callable[[], bool]
"""Asked just before results are stored: whether this worker still holds the unit."""

REJECTS = pa.schema([("item", pa.string()), ("outcome", pa.string()), ("reason", pa.string())])
PART_ROWS = 256


@dataclass(frozen=True)
class Unit:
    """What a worker takes at once: a run of items of one subject, or a whole job.

    Attributes:
        subject: The film, shard, snapshot or story.
        index: Its place among the subject's units.
        fingerprint: Of the subject's recipe; names the scratch folder of a job.
        inputs: Role to stored files. For an item stage the first role's files are this unit's own.
        rows: The items themselves, for a stage whose first input is no artifact (a film's file).
        items: How many items it holds, for progress.
        earlier: Where results of items may be taken from whose own inputs are as they were.
    """

    subject: str
    index: int
    fingerprint: str
    inputs: dict[str, tuple[StoredFile, ...]]
    rows: tuple[Row, ...] = ()
    items: int = 1
    earlier: Earlier | None = None


@dataclass(frozen=True)
class UnitResult:
    """What came of a unit. `error` is None when it worked.

    Attributes:
        files: Stored output files, in order.
        counts: Outcomes: `ok`, `skip:<reason>`, `fail`.
        summary: What a job said of its result.
        seconds: Work time.
        reused: Items that were taken from an earlier result.
        error: What went wrong, for a person.
        retryable: Whether trying again later may help.
    """

    files: tuple[StoredFile, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reused: int = 0
    error: str | None = None
    retryable: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, as the catalog keeps them."""
        return self.__dict__ | {"files": [f.as_dict() for f in self.files]}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "UnitResult":
        """The inverse of `as_dict`; what else the catalog keeps beside it is left out."""
        known = {name: values[name] for name in UnitResult.__dataclass_fields__ if name in values}
        return UnitResult(**(known | {"files": tuple(StoredFile(**f) for f in values["files"])}))


@dataclass(frozen=True)
class WorkerSettings:
    """Where a worker finds things: the object store, a folder for scratch, the weights."""

    store_uri: str
    scratch: Path
    weights_dir: Path | None


class Worker:
    """Runs units of any stage, keeping the last stage's models loaded.

    Args:
        settings: Where things are.
        results: Where results are stored; None for where the inputs are.

    Errors of the unit's own never escape: they come back in the `UnitResult`. Storage that is full does escape,
    because every other unit would meet it too.
    """

    def __init__(self, settings: WorkerSettings, results: ObjectStore | None = None) -> None:
        self._settings = settings
        self._store = ObjectStore(settings.store_uri, settings.scratch / "objects")
        self._results = results or self._store
        self._loaded: tuple[Any, Any] | None = None

    def run(
        self,
        spec: StageSpec,
        config: StageConfig,
        unit: Unit,
        progress: Progress = no_progress,
        may_store: MayStore = lambda: True,
    ) -> UnitResult:
        """Run one unit.

        Raises:
            StoreFullError: The store cannot be written.
            StoreUnavailableError: The store does not answer.
        """
        started = time.perf_counter()
        try:
            return self.compute(spec, config, unit, progress, may_store)
        except Exception as error:
            return _fail(spec, error, time.perf_counter() - started)

    def run_together(
        self,
        spec: StageSpec,
        config: StageConfig,
        units: Sequence[Unit],
        progress: Progress = no_progress,
        may_store: MayStore = lambda: True,
    ) -> list[UnitResult]:
        """Run units of a job that takes several subjects at once; where that fails as a whole, one after the other.

        Raises:
            StoreFullError, StoreUnavailableError: As `run`.
        """
        if len(units) > 1:
            started = time.perf_counter()
            try:
                return self._run_jobs(spec, config, units, progress, may_store)
            except Exception as error:
                told = _fail(spec, error, time.perf_counter() - started)
                log.warning("%s of %d subjects at once, now one by one: %s", spec.name, len(units), told.error)
        return [self.run(spec, config, unit, progress, may_store) for unit in units]

    def compute(
        self,
        spec: StageSpec,
        config: StageConfig,
        unit: Unit,
        progress: Progress = no_progress,
        may_store: MayStore = lambda: True,
    ) -> UnitResult:
        """`run`, with every error as it was raised: for a debugger."""
        started = time.perf_counter()
        stage = self._load(spec, config)
        body = self._run_job if spec.schema is None else self._run_items
        result = body(spec, stage, unit, progress, may_store)
        return replace(result, seconds=time.perf_counter() - started)

    def _load(self, spec: StageSpec, config: StageConfig) -> Any:
        key = (spec.implementation, config)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # let go of the last stage's models before the next ones load
            self._loaded = (key, spec.load()(config, self._settings.weights_dir))
        return self._loaded[1]

    def _run_job(self, spec: StageSpec, job: Any, unit: Unit, progress: Progress, may_store: MayStore) -> UnitResult:
        scratch = self._settings.scratch / f"{spec.name}-{unit.fingerprint[:16]}"
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch.parent, prefix=f"{spec.name}-") as folder:
            inputs, out = self._lay_out(unit, Path(folder))
            summary = job(inputs, out, scratch, progress)
            result = self._keep(spec, unit, out, summary, may_store)
        shutil.rmtree(scratch)
        return result

    def _run_jobs(
        self, spec: StageSpec, config: StageConfig, units: Sequence[Unit], progress: Progress, may_store: MayStore
    ) -> list[UnitResult]:
        """Each unit's result; their time is shared out evenly."""
        started, job = time.perf_counter(), self._load(spec, config)
        self._settings.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._settings.scratch, prefix=f"{spec.name}-") as folder:
            places = [self._lay_out(unit, Path(folder, str(index))) for index, unit in enumerate(units)]
            results = []
            for unit, (_, out), came in zip(units, places, job.together(places, progress), strict=True):
                if isinstance(came, Exception):
                    results.append(_fail(spec, came, 0.0))
                else:
                    results.append(self._keep(spec, unit, out, came, may_store))
        return [replace(result, seconds=(time.perf_counter() - started) / len(units)) for result in results]

    def _lay_out(self, unit: Unit, folder: Path) -> tuple[dict[str, list[Path]], Path]:
        """A job's inputs, and the folder for what it makes."""
        out = folder / "out"
        out.mkdir(parents=True)
        return self._link_inputs(unit, folder), out

    def _keep(self, spec: StageSpec, unit: Unit, out: Path, summary: dict[str, Any], may_store: MayStore) -> UnitResult:
        """Store what a job made."""
        paths = sorted(p for p in out.rglob("*") if p.is_file())
        if not paths:
            raise StageError(f"{spec.name} wrote no file")
        _insist(may_store, spec, unit)
        files = [self._results.put(path, path.relative_to(out).as_posix()) for path in paths]
        return UnitResult(tuple(files), {"ok": 1}, summary)

    def _link_inputs(self, unit: Unit, folder: Path) -> dict[str, list[Path]]:
        """Give a job its input files under their own names."""
        inputs: dict[str, list[Path]] = {}
        for role, files in unit.inputs.items():
            for stored in files:
                link = folder / "in" / role / stored.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(self._store.path(stored))
                inputs.setdefault(role, []).append(link)
        return inputs

    def _run_items(
        self, spec: StageSpec, stage: Any, unit: Unit, progress: Progress, may_store: MayStore
    ) -> UnitResult:
        items, others = self._read_inputs(spec, unit)
        kept = find_kept(self._store, spec, unit.earlier, items, others) if unit.earlier and items else {}
        todo = [row for row in items if spec.item_of(row) not in kept]
        if kept:
            frames = {row["frame_index"] for row in todo}
            others = {role: [row for row in rows if row["frame_index"] in frames] for role, rows in others.items()}
        counts: Counter = Counter()
        self._settings.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._settings.scratch, prefix=f"{spec.name}-") as folder:
            table = TableWriter(Path(folder), spec.schema, "part", PART_ROWS)
            rejects = TableWriter(Path(folder), REJECTS, "rejects", 1 << 20)
            outcomes = checked(spec, todo, stage(**{spec.inputs[0]: todo}, **others)) if todo else iter(())
            for done, outcome in enumerate(_merged([spec.item_of(row) for row in items], kept, outcomes), 1):
                _write_outcome(outcome, table, rejects, counts)
                progress(done, len(items), "")
            parts = table.close() + rejects.close(keep_empty=False)
            if counts["retry"]:
                return _put_off(counts, Path(folder))
            _insist(may_store, spec, unit)
            files = [
                self._results.put(path, f"{path.stem}-{unit.index:05d}{path.suffix}", rows) for path, rows in parts
            ]
        return UnitResult(tuple(sorted(files, key=lambda f: f.name)), dict(counts), reused=len(kept))

    def _localize(self, row: Row) -> Row:
        """A film in a bucket is fetched by the worker that reads it."""
        remote = "://" in row.get("uri", "") and not row["uri"].startswith("/")
        return row | {"uri": str(download(row["uri"], self._settings.scratch / "films"))} if remote else row

    def _read_inputs(self, spec: StageSpec, unit: Unit) -> tuple[list[Row], dict[str, list[Row]]]:
        """The unit's items, and the rows of the other inputs that belong to the same frames."""
        first, *rest = spec.inputs
        if unit.rows:
            return [self._localize(row) for row in unit.rows], {}
        items = list(read_rows(self._store, unit.inputs[first]))
        if not items:
            return [], {role: [] for role in rest}
        frames = [row["frame_index"] for row in items]
        wanted = set(frames)
        others = {}
        for role in rest:
            rows = read_rows(self._store, unit.inputs[role], (min(frames), max(frames)))
            others[role] = [row for row in rows if row["frame_index"] in wanted]
        return items, others


def _put_off(counts: Counter, folder: Path) -> UnitResult:
    """What becomes of a unit with items that may work another time: nothing is stored, or they would be lost."""
    rows = (row for path in sorted(folder.glob("rejects-*")) for row in pq.read_table(path).to_pylist())
    first = next(row for row in rows if row["outcome"] == "retry")
    error = (
        f"{counts['retry']} of {counts.total()} items are to be tried again, such as {first['item']}: {first['reason']}"
    )
    return UnitResult(error=error, counts=dict(counts), retryable=True)


def _merged(order: list[str], kept: dict[str, Outcome], computed: Iterator[Outcome]) -> Iterator[Outcome]:
    """All outcomes in the order of the items."""
    for item in order:
        if item in kept:
            yield kept[item]
        else:
            yield from itertools.islice(computed, 1)
    yield from computed


def _insist(may_store: MayStore, spec: StageSpec, unit: Unit) -> None:
    """A worker that comes back late, after its unit was given to another, must not store anything.

    Raises:
        ComputationError: The unit is another worker's by now.
    """
    if not may_store():
        raise ComputationError(
            f"{spec.name} of {unit.subject}, unit {unit.index}, was given to another worker meanwhile"
        )


def checked(spec: StageSpec, items: list[Row], outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """Pass outcomes on, and insist on exactly one for each item.

    Raises:
        StageError: An item got none, two, or an outcome names an item that was not asked for.
    """
    expected = [spec.item_of(row) for row in items]
    open_items = set(expected)
    if len(open_items) != len(expected):
        raise StageError(f"{spec.name}: {len(expected) - len(open_items)} of its input items share a key {spec.key}")
    for outcome in outcomes:
        if outcome.item not in open_items:
            known = "twice" if outcome.item in expected else "though it was not among its inputs"
            raise StageError(f"{spec.name} gave an outcome for item {outcome.item} {known}")
        open_items.remove(outcome.item)
        yield outcome
    if open_items:
        raise StageError(f"{spec.name} gave no outcome for {len(open_items)} items, for example {min(open_items)}")


def _write_outcome(outcome: Outcome, table: TableWriter, rejects: TableWriter, counts: Counter) -> None:
    match outcome:
        case Ok(rows=rows):
            for row in rows:
                table.write(row)
            counts["ok"] += 1
        case Skip(item=item, reason=reason):
            rejects.write({"item": item, "outcome": "skip", "reason": reason})
            counts[f"skip:{reason}"] += 1
        case Fail(item=item, error=error, retryable=retryable):
            rejects.write({"item": item, "outcome": "retry" if retryable else "fail", "reason": error})
            counts["retry" if retryable else "fail"] += 1


def _fail(spec: StageSpec, error: Exception, seconds: float) -> UnitResult:
    """The result of a unit that failed.

    Raises:
        StoreFullError, StoreUnavailableError: Everyone's problem, not this unit's.
    """
    if isinstance(error, StoreFullError | StoreUnavailableError):
        raise error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise StoreFullError(f"no space left while computing {spec.name}: {error}; free some space") from error
    permanent = isinstance(error, FilmError)  # the film itself is bad; all else may work another time
    return UnitResult(error=_describe(error), seconds=seconds, retryable=not permanent)


def _describe(error: Exception) -> str:
    """One error for a person. Ours and the models' own speak for themselves; of others the place is told too."""
    own = isinstance(error, MoviedreamerError | StorageError) or type(error).__module__.startswith("models.")
    if own and not isinstance(error, StageError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (at {Path(frame.filename).name}:{frame.lineno})"
