"""Runs stages: plans units, hands them to workers (inline, or Ray actors), and commits each subject when it is whole.

A killed run resumes at the units that are missing: each finished unit is in the catalog before the next is asked for.
"""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from stages.errors import MissingInputError
from stages.reuse import Earlier
from stages.spec import StageConfig, StageSpec
from stages.worker import Unit, UnitResult, Worker, WorkerSettings
from storage.artifacts import Artifact, Recipe, artifact_id, content_digest, read_rows
from storage.catalog import Catalog
from storage.objects import ObjectStore, StoredFile

log = logging.getLogger(__name__)

UnitProgress = Callable[[float, float, str], None]
"""Called as `progress(items_done, items_in_all, message)`."""


@dataclass(frozen=True)
class Work:
    """One stage on one subject: everything that decides the result.

    Attributes:
        spec: The stage.
        config: Its settings.
        subject: What it is about.
        inputs: Role to the artifacts read.
        source: For a stage whose first input is no artifact: the item's row, and the digest of what it names.
        weights: Name to digest of the weights used.
    """

    spec: StageSpec
    config: StageConfig
    subject: str
    inputs: dict[str, list[Artifact]]
    weights: dict[str, str]
    source: tuple[dict[str, Any], str] | None = None

    @property
    def recipe(self) -> Recipe:
        """What the fingerprint is made from."""
        inputs = {role: [a.digest for a in artifacts] for role, artifacts in self.inputs.items()}
        if self.source:
            inputs[self.spec.inputs[0]] = [self.source[1]]
        return Recipe(self.spec.name, self.spec.version, self.config.recipe(), self.weights, inputs)


@dataclass
class StageReport:
    """What a stage did with its subjects.

    Attributes:
        stage: Its name.
        fresh: Subjects that needed nothing.
        done: Subject to the artifact just made.
        failed: Subject to the error.
        counts: Outcomes over all items just computed.
        reused: Items of these whose outcome was taken from an earlier result.
        seconds: Wall time.
    """

    stage: str
    fresh: list[str] = field(default_factory=list)
    done: dict[str, Artifact] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    reused: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """The one log line of a stage."""
        rejects = ", ".join(f"{n} {k}" for k, n in sorted(self.counts.items()) if k != "ok")
        reused = f"; {self.reused} of {self.counts.total()} items reused" if self.reused else ""
        return (
            f"{self.stage}: {len(self.done)} done, {len(self.fresh)} fresh, {len(self.failed)} failed; "
            f"{self.counts['ok']} items ok{', ' + rejects if rejects else ''}{reused}; {self.seconds:.1f} s"
        )


class Executor(Protocol):
    """Where units run."""

    def run(
        self, spec: StageSpec, config: StageConfig, units: Sequence[tuple[Work, Unit]], progress: UnitProgress
    ) -> Iterator[tuple[Work, Unit, UnitResult, int]]:
        """Yield each unit's result, with the attempts it took, as it arrives."""
        ...


def group_units(units: Sequence[tuple[Work, Unit]], workers: int = 1) -> list[tuple[tuple[Work, Unit], ...]]:
    """Units as workers take them: one by one, or several subjects of a job that takes them at once.

    Args:
        units: In their order.
        workers: How many there are; none is left without a part.
    """
    groups: list[tuple[tuple[Work, Unit], ...]] = []
    for config, found in itertools.groupby(units, key=lambda pair: pair[0].config):
        alike = list(found)
        most = min(config.subjects_at_once(), -(-len(alike) // workers))
        groups += [tuple(alike[start : start + most]) for start in range(0, len(alike), most)]
    return groups


class InlineExecutor:
    """Runs units one after the other in this process."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._worker = Worker(settings)

    def run(
        self, spec: StageSpec, config: StageConfig, units: Sequence[tuple[Work, Unit]], progress: UnitProgress
    ) -> Iterator[tuple[Work, Unit, UnitResult, int]]:
        """See `Executor.run`."""
        total, before = sum(unit.items for _, unit in units), 0
        for group in group_units(units):
            items = sum(unit.items for _, unit in group)

            def report(done: int, of: int, message: str, items: int = items, before: int = before) -> None:
                progress(before + items * done / max(of, 1), total, message)

            results = self._worker.run_together(spec, group[0][0].config, [unit for _, unit in group], report)
            before += items
            for (work, unit), result in zip(group, results, strict=True):
                yield work, unit, result, 1


class Engine:
    """Computes what is missing of a stage and commits it.

    Args:
        catalog: Where results are recorded.
        store: Where their bytes are kept.
        executor: Where units run.
        run_id: The run on whose behalf artifacts are made.
    """

    def __init__(self, catalog: Catalog, store: ObjectStore, executor: Executor, run_id: str | None = None) -> None:
        self._catalog, self._store, self._executor, self._run_id = catalog, store, executor, run_id

    def run(self, works: Sequence[Work], progress: UnitProgress) -> StageReport:
        """Compute all works, which share one stage; one that fails never stops the others."""
        report = StageReport(works[0].spec.name)
        started = time.perf_counter()
        pending = {work.subject: _Pending(work, self.plan_units(work)) for work in works}
        todo = []
        for item in pending.values():
            item.results.update(self._finished_units(item))
            todo += [(item.work, unit) for unit in item.units if unit.index not in item.results]
        for item in pending.values():
            self._settle(item, report)
        spec, config = works[0].spec, works[0].config
        for work, unit, result, attempts in self._executor.run(spec, config, todo, progress):
            self._record(work, unit, result, attempts)
            item = pending[work.subject]
            item.results[unit.index] = result
            self._settle(item, report)
        report.seconds = time.perf_counter() - started
        log.info(report.line())
        return report

    def plan_units(self, work: Work) -> list[Unit]:
        """Split a subject: by part files of the first input, or all at once.

        Raises:
            MissingInputError: An input is not there.
        """
        fingerprint = work.recipe.fingerprint
        if work.source:
            return [Unit(work.subject, 0, fingerprint, {}, (work.source[0],))]
        if work.spec.schema is None:
            files = {role: _named(artifacts) for role, artifacts in work.inputs.items()}
            return [Unit(work.subject, 0, fingerprint, files)]
        files = {role: tuple(f for a in artifacts for f in a.tables) for role, artifacts in work.inputs.items()}
        first = work.spec.inputs[0]
        if not files.get(first):
            raise MissingInputError(f"{work.spec.name} of {work.subject} needs {first}, which is not there")
        if work.spec.scope == "film":
            return [Unit(work.subject, 0, fingerprint, files, items=sum(f.rows for f in files[first]))]
        earlier = self._find_earlier(work)
        return [
            Unit(work.subject, index, fingerprint, files | {first: (part,)}, items=part.rows, earlier=earlier)
            for index, part in enumerate(files[first])
        ]

    def _find_earlier(self, work: Work) -> Earlier | None:
        """The newest result of the same stage, settings and weights for the subject, and what it was made from."""
        now = work.recipe
        same = {"version": now.version, "config": dict(now.config), "weights": dict(now.weights)}
        for artifact in reversed(self._catalog.artifacts_of(work.spec.output, work.subject)):
            if any(artifact.recipe[name] != value for name, value in same.items()):
                continue
            inputs = {found.kind: found.tables for i in artifact.inputs if (found := self._catalog.artifact(i))}
            if inputs.keys() == set(work.spec.inputs):
                return Earlier(inputs, artifact.files)
        return None

    def _finished_units(self, item: "_Pending") -> dict[int, UnitResult]:
        work = item.work
        rows = self._catalog.units(work.spec.name, work.subject, work.recipe.fingerprint)
        done = {i: UnitResult.from_dict(row["result"]) for i, row in rows.items() if row["state"] == "done"}
        return {i: r for i, r in done.items() if i < len(item.units)}

    def _record(self, work: Work, unit: Unit, result: UnitResult, attempts: int) -> None:
        key = (work.spec.name, work.subject, unit.fingerprint, unit.index)
        if result.error is None:
            self._catalog.save_unit(key, "done", attempts, result.as_dict())
            return
        inputs = {role: [f.as_dict() for f in files] for role, files in unit.inputs.items()}
        facts = {"inputs": inputs, "source": unit.rows[0] if unit.rows else None, "version": work.spec.version}
        self._catalog.save_unit(key, "failed", attempts, result.as_dict() | facts)

    def _settle(self, item: "_Pending", report: StageReport) -> None:
        """Commit a subject whose units are all there; report one that has failed."""
        work, spec = item.work, item.work.spec
        if work.subject in report.done or work.subject in report.failed or len(item.results) < len(item.units):
            return
        results = [item.results[unit.index] for unit in item.units]
        counts: Counter = sum((Counter(r.counts) for r in results), Counter())
        error = next((r.error for r in results if r.error), None)
        if error is None and counts["fail"] and counts["fail"] == counts.total():
            error = self._first_reject(results)
            for unit, result in zip(item.units, results, strict=True):
                self._record(work, unit, UnitResult(error=error, counts=result.counts), 1)
        if error is not None:
            report.failed[work.subject] = error
            return
        report.counts += counts
        report.reused += sum(r.reused for r in results)
        report.done[work.subject] = self._commit(work, results, dict(counts))
        log.debug("%s: %s committed", spec.name, work.subject)

    def _first_reject(self, results: Sequence[UnitResult]) -> str:
        """Why the first item of a subject failed."""
        rejected = [f for result in results for f in result.files if f.name.startswith("rejects-")]
        return next(read_rows(self._store, rejected))["reason"]

    def _commit(self, work: Work, results: Sequence[UnitResult], counts: dict[str, int]) -> Artifact:
        spec, recipe = work.spec, work.recipe
        files = tuple(f for result in results for f in result.files)
        return self._catalog.commit(
            Artifact(
                id=artifact_id(spec.output, work.subject, recipe.fingerprint),
                kind=spec.output,
                subject=work.subject,
                fingerprint=recipe.fingerprint,
                digest=content_digest(files),
                recipe={**recipe.__dict__},
                files=files,
                inputs=tuple(a.id for artifacts in work.inputs.values() for a in artifacts),
                counts=counts,
                summary={key: value for result in results for key, value in result.summary.items()},
                seconds=sum(result.seconds for result in results),
            ),
            self._run_id,
        )


@dataclass
class _Pending:
    """A subject on its way: its units, and the results so far."""

    work: Work
    units: list[Unit]
    results: dict[int, UnitResult] = field(default_factory=dict)


def _named(artifacts: Sequence[Artifact]) -> tuple[StoredFile, ...]:
    """The files of a role of a job, each under the number of its artifact, because artifacts share file names."""
    return tuple(replace(f, name=f"{i:05d}/{f.name}") for i, a in enumerate(artifacts) for f in a.results)
