"""One walk through the stages, used twice: to find out what is to be done, and to do it.

`Pipeline.step` takes one stage and its subjects. Subjects whose recipe has an artifact are fresh. The others are
computed, or, in a plan, noted as to do; what depends on them is then noted as waiting.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.profile import Profile
from flows.workspace import Workspace
from stages.engine import Engine, Executor, StageReport, UnitProgress, Work
from stages.spec import StageSpec
from storage.artifacts import Artifact
from storage.plan import decide

log = logging.getLogger(__name__)

COMPUTABLE = ("missing", "stale")
"""States of subjects that a walk computes; what failed for good is left alone."""

Runner = Callable[[StageSpec, Sequence[Work]], StageReport]
"""Computes works of one stage; in a flow, a Prefect task run."""


@dataclass(frozen=True)
class Todo:
    """Something that a plan found to be done."""

    stage: str
    subject: str
    state: str
    reason: str


@dataclass
class Pipeline:
    """The walk.

    Attributes:
        workspace: Where artifacts are.
        profile: All settings.
        runner: Computes what is not fresh; None makes this a plan.
        run_id: The run that computes; None in a plan.
        todo: What a plan found to be done.
        failed: Subject to stage and error, of what failed now or earlier.
        reports: What each computed stage did.
        fresh: How many subjects needed nothing.
    """

    workspace: Workspace
    profile: Profile
    runner: Runner | None = None
    run_id: str | None = None
    todo: list[Todo] = field(default_factory=list)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    reports: list[StageReport] = field(default_factory=list)
    fresh: int = 0
    _made: dict[tuple[str, str], Artifact] = field(default_factory=dict)
    _identities: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)

    def step(self, spec: StageSpec, works: Iterable[Work], states: Collection[str] = COMPUTABLE) -> None:
        """One stage on its subjects. What is in none of `states` stays as it is, and what follows waits for it."""
        stale, works, catalog = [], list(works), self.workspace.catalog
        fresh = catalog.find_all(spec.output, {work.subject: work.recipe.fingerprint for work in works})
        current = catalog.current_digests(spec.output) if fresh and self.runner else {}
        for work in works:
            if artifact := fresh.get(work.subject):
                self.keep(artifact, current.get(work.subject))
                continue
            decision = decide(catalog, spec.output, work.subject, work.recipe)
            if decision.artifact is not None:  # committed just now, by another run
                self.keep(decision.artifact, None)
            elif decision.state == "failed":
                self.failed[work.subject] = (spec.name, decision.reason)
            elif decision.state not in states:
                continue
            elif self.runner is None:
                self.todo.append(Todo(spec.name, work.subject, decision.state, decision.reason))
            else:
                log.info("%s: %s is %s: %s", spec.name, work.subject, decision.state, decision.reason)
                stale.append(work)
        if stale and self.runner:
            report = self.runner(spec, stale)
            self.reports.append(report)
            for artifact in report.done.values():
                self.adopt(artifact)
            for subject, error in report.failed.items():
                self.failed[subject] = (spec.name, error)

    def keep(self, artifact: Artifact, current: tuple[str, str] | None) -> None:
        """Take a fresh artifact. Where a setting went back to an earlier value, an earlier one is current again.

        Args:
            artifact: The fresh one.
            current: Id and digest of the subject's current one, as `Catalog.current_digests` tells it.
        """
        self.fresh += 1
        self.adopt(artifact)
        if self.runner and (current is None or current[0] != artifact.id):
            self.workspace.catalog.set_current(artifact)

    def adopt(self, artifact: Artifact) -> None:
        """Take an artifact into this walk as it is."""
        self._made[artifact.kind, artifact.subject] = artifact

    def get(self, kind: str, subject: str) -> Artifact | None:
        """The artifact of this walk for a subject, or None where it failed or waits."""
        return self._made.get((kind, subject))

    def all(self, kind: str) -> list[Artifact]:
        """Every artifact of a kind in this walk, by subject."""
        return [a for (k, _), a in sorted(self._made.items()) if k == kind]

    def work(
        self,
        spec: StageSpec,
        subject: str,
        inputs: dict[str, list[Artifact]],
        source: tuple[dict[str, Any], str] | None = None,
        **config: Any,
    ) -> Work:
        """Describe a stage on a subject; `config` sets fields of its settings that depend on the inputs."""
        from models.weights import identities

        settings = self.profile.config(spec)
        if config:
            settings = settings.model_copy(update=config)
        names = settings.recipe_weights()
        if names not in self._identities:  # read once a walk, not once a film
            self._identities[names] = identities(names, self.profile.engine.weights_dir)
        weights = self._identities[names]
        return Work(spec, settings, subject, inputs, weights, source)


def start_cluster(profile: Profile) -> None:
    """Start or join Ray, where the profile runs units on it, ahead of `open_executor`: it takes seconds."""
    if profile.engine.executor == "ray":
        from stages.cluster import start_ray

        start_ray(profile.engine.ray_address, profile.engine.cpus)


def open_executor(workspace: Workspace, profile: Profile) -> Executor:
    """Start what runs the units: call it in a flow's body, and `close` it there."""
    from stages.engine import InlineExecutor
    from stages.worker import WorkerSettings

    settings = WorkerSettings(workspace.store.uri, workspace.scratch, profile.engine.weights_dir)
    if profile.engine.executor == "inline":
        return InlineExecutor(settings)
    from stages.cluster import RayExecutor

    engine = profile.engine
    return RayExecutor(settings, engine.ray_address, engine.cpus, engine.max_concurrent)


def compute(
    workspace: Workspace, executor: Executor, run_id: str, works: Sequence[Work], progress: UnitProgress
) -> StageReport:
    """Compute works of one stage and commit them."""
    return Engine(workspace.catalog, workspace.store, executor, run_id).run(works, progress)
