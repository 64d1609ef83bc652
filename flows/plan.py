"""What an ingestion would do, stage by stage and film by film, without doing any of it."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from flows.ingest import FILM_STAGES, HELDOUT_SPLITS, shard_name
from flows.profile import Profile
from flows.sources import listed_films
from flows.workspace import Workspace
from models.weights import identities
from stages import keyframes, shards
from stages.errors import UsageError
from stages.shards import shard_of
from stages.spec import StageConfig, StageSpec
from storage.artifacts import Fingerprinter, Recipe
from storage.plan import Estimate, Index, estimate_cost, explain_change

STAGES = (*FILM_STAGES, shards.SPEC)
STATES = ("fresh", "missing", "failed", "stale", "blocked")
COSTS_READ = 200


@dataclass(frozen=True)
class PlannedFilm:
    """A film as a plan sees it.

    Attributes:
        film_id: Its id.
        digest: Of its bytes; None where they are not known, because the film is new or its file changed.
        obstacle: Why the digest is not known.
        split: As in the catalog.
    """

    film_id: str
    digest: str | None
    obstacle: str = ""
    split: str | None = None


@dataclass(frozen=True)
class Group:
    """Subjects of one stage that share state and reason.

    Attributes:
        stage, state, reason: See `Plan`.
        due: Whether an ingestion would compute them; what failed, or waits for something that did, it leaves alone.
        subjects: Film ids, or names of shards.
    """

    stage: str
    state: str
    reason: str
    due: bool
    subjects: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """What a plan found.

    Attributes:
        groups: By stage, in the order of the work; every subject is in one group of each stage.
        estimates: Stage to the cost of what is due, in seconds on this machine.
    """

    groups: list[Group]
    estimates: dict[str, Estimate]

    def counts(self) -> dict[str, Counter]:
        """Stage to how many subjects are in each state."""
        counts: dict[str, Counter] = {stage: Counter() for stage in self.estimates}
        for group in self.groups:
            counts[group.stage][group.state] += len(group.subjects)
        return counts

    def total(self) -> Estimate:
        """The cost of all stages; unknown as soon as that of one stage is."""
        known = [asdict(estimate) for estimate in self.estimates.values()]
        sums = {
            name: [values[name] for values in known] for name in ("seconds", "seconds_low", "seconds_high", "bytes")
        }
        return Estimate(**{name: None if None in values else sum(values) for name, values in sums.items()})

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, as `moviedreamer plan --json` prints them."""
        counts = self.counts()
        return {
            "stages": [
                {"stage": stage, **{state: counts[stage][state] for state in STATES}, "estimate": asdict(estimate)}
                for stage, estimate in self.estimates.items()
            ],
            "groups": [vars(group) for group in self.groups],
            "total": asdict(self.total()),
        }


def select_stages(selection: str | None) -> list[StageSpec]:
    """The stages that `STAGE`, `STAGE+` (and what follows from it) or `+STAGE` (and what it needs) means; all for None.

    Raises:
        UsageError: There is no such stage.
    """
    if selection is None:
        return list(STAGES)
    name = selection.strip("+")
    by_name = {spec.name: spec for spec in STAGES}
    if name not in by_name:
        raise UsageError(f"no stage {name!r} to select: expected one of {', '.join(by_name)}, with a + before or after")
    chosen = {name}
    if selection.endswith("+"):
        for spec in STAGES:
            if chosen & {by_output(kind) for kind in spec.inputs}:
                chosen.add(spec.name)
    if selection.startswith("+"):
        for spec in reversed(STAGES):
            if spec.name in chosen:
                chosen |= {by_output(kind) for kind in spec.inputs} & by_name.keys()
    return [spec for spec in STAGES if spec.name in chosen]


def by_output(kind: str) -> str:
    """The stage that makes a kind of artifact."""
    return next((spec.name for spec in STAGES if spec.output == kind), kind)


def choose_films(workspace: Workspace, chosen: str | None) -> tuple[list[PlannedFilm], set[str]]:
    """All films of the workspace, with those of a catalogue that are new to it, and the ids of those chosen.

    Args:
        workspace: Whose films.
        chosen: A pattern of film ids (`*`, `?`, `[...]`), or a CSV or Parquet catalogue; None chooses all.

    Raises:
        UsageError: No film is chosen.
        CatalogueError: The catalogue cannot be used.
    """
    films = {row["film_id"]: _look_at(row) for row in workspace.catalog.films()}
    if chosen is None:
        return list(films.values()), set(films)
    listed = listed_films(chosen)
    if listed is not None:
        for film_id, source in listed.items():
            films.setdefault(film_id, PlannedFilm(film_id, None, "never ingested", source.split))
        return list(films.values()), set(listed)
    ids = {film_id for film_id in films if fnmatchcase(film_id, chosen)}
    if not ids:
        raise UsageError(
            f"no film of the workspace matches {chosen!r}: expected an id, a pattern such as '*.mp4', or a catalogue"
        )
    return list(films.values()), ids


def _look_at(row: dict[str, Any]) -> PlannedFilm:
    """A film that the catalog knows. A file that is gone stays known by its digest; one that changed does not."""
    digest, obstacle = row["digest"], ""
    try:
        facts = os.stat(row["uri"])
    except OSError:
        pass
    else:
        if (facts.st_size, facts.st_mtime_ns) != (row["bytes"], row["modified_ns"]):
            digest, obstacle = None, "the file changed since it was ingested"
    return PlannedFilm(row["film_id"], digest, obstacle, row["split"])


def make_plan(
    workspace: Workspace, profile: Profile, films: Sequence[PlannedFilm], chosen: set[str], stages: Sequence[StageSpec]
) -> Plan:
    """Find the state of every stage and film. Nothing is written.

    Args:
        workspace: Read only.
        profile: The settings to plan with.
        films: All films of the workspace, and those to come.
        chosen: Ids of the films that the plan is about; their shards hold others too.
        stages: Stages that the plan is about.
    """
    planner = _Planner(workspace, profile, films)
    for spec in FILM_STAGES:
        planner.plan_stage(spec, films)
    planner.plan_shards(films)
    touched = {shard_name(shard_of(film_id, profile.shards.count)) for film_id in chosen}
    names = {spec.name for spec in stages}
    groups = []
    for group in planner.groups():
        wanted = touched if group.stage == shards.SPEC.name else chosen
        subjects = group.subjects if len(chosen) == len(films) else [s for s in group.subjects if s in wanted]
        if subjects and group.stage in names:
            groups.append(replace(group, subjects=subjects))
    return Plan(groups, {spec.name: _estimate(workspace, spec, groups) for spec in stages})


class _Planner:
    """The walk over all stages. A stage's result is known where it is fresh; what needs an unknown one is blocked."""

    def __init__(self, workspace: Workspace, profile: Profile, films: Sequence[PlannedFilm]) -> None:
        self._catalog, self._profile = workspace.catalog, profile
        self._index = Index(workspace.catalog, [spec.output for spec in STAGES])
        self._digests: dict[str, dict[str, str]] = {spec.output: {} for spec in STAGES}
        (source,) = keyframes.SPEC.inputs
        self._digests[source] = {film.film_id: film.digest for film in films if film.digest is not None}
        self._groups: dict[tuple[str, str, str, bool], list[str]] = {}
        self._failed: dict[str, str] = {}

    def groups(self) -> list[Group]:
        return [Group(*key, subjects) for key, subjects in self._groups.items()]

    def plan_stage(self, spec: StageSpec, films: Sequence[PlannedFilm]) -> None:
        """Nearly always nearly all films are fresh: those are told by one look-up each, the others one by one."""
        config = self._profile.config(spec)
        fingerprint = _fingerprinter(self._profile, spec, config).with_roles(spec.inputs)
        known, made = self._index.digests[spec.output], self._digests[spec.output]
        inputs = [self._digests[kind] for kind in sorted(spec.inputs)]
        fresh, others = [], []
        for film in films:
            film_id = film.film_id
            digests = [found.get(film_id) for found in inputs]
            digest = None if None in digests else known.get((film_id, fingerprint(digests)))
            if digest is None:
                others.append((film, digests))
            else:
                made[film_id] = digest
                fresh.append(film_id)
        if fresh:
            self._groups[spec.name, "fresh", "", False] = fresh
        stale = {}
        for film, digests in others:
            if obstacle := self._find_obstacle(spec, film):
                state = "blocked"
                if spec is keyframes.SPEC:
                    state = "stale" if self._index.knows(spec.output, film.film_id) else "missing"
                self._note(spec, state, obstacle, film.film_id, due=film.film_id not in self._failed)
            elif self._settle(spec, film.film_id, fingerprint(digests)):
                stale[film.film_id] = {role: [d] for role, d in zip(sorted(spec.inputs), digests, strict=True)}
        self._explain(spec, config, stale)

    def _find_obstacle(self, spec: StageSpec, film: PlannedFilm) -> str:
        """Why the digests of a stage's inputs are not known; empty where they are."""
        if spec is keyframes.SPEC:
            return film.obstacle
        missing = next((kind for kind in spec.inputs if film.film_id not in self._digests[kind]), None)
        if missing is None:
            return ""
        failed = self._failed.get(film.film_id)
        return f"{failed} failed" if failed else f"waits for {by_output(missing)}"

    def _settle(self, spec: StageSpec, subject: str, fingerprint: str) -> bool:
        """Note a subject whose state is plain; True for a stale one, which still needs its reason."""
        digest = self._index.digests[spec.output].get((subject, fingerprint))
        if digest is not None:
            self._note(spec, "fresh", "", subject, due=False)
        elif error := self._index.failure(spec.name, subject, fingerprint):
            self._failed[subject] = spec.name
            self._note(spec, "failed", error, subject, due=False)
        elif self._index.knows(spec.output, subject):
            return True
        else:
            self._note(spec, "missing", "never computed", subject)
        return False

    def _explain(self, spec: StageSpec, config: StageConfig, stale: dict[str, dict[str, list[str]]]) -> None:
        before = self._catalog.current_recipes(spec.output, stale)
        weights = _weights(self._profile, config)
        for subject, inputs in stale.items():
            now = Recipe(spec.name, spec.version, config.recipe(), weights, inputs)
            known = before.get(subject)
            self._note(spec, "stale", explain_change(known, now) if known else "another recipe made it", subject)

    def plan_shards(self, films: Sequence[PlannedFilm]) -> None:
        """A shard waits for films that are still to be computed, and goes without those that failed."""
        spec, settings = shards.SPEC, self._profile.shards
        members: dict[str, list[PlannedFilm]] = {}
        for film in sorted(films, key=lambda film: film.film_id):
            members.setdefault(shard_name(shard_of(film.film_id, settings.count)), []).append(film)
        for name, dealt in sorted(members.items()):
            whole = [f for f in dealt if all(f.film_id in self._digests[kind] for kind in spec.inputs)]
            if len(whole) < sum(f.film_id not in self._failed for f in dealt):
                self._note(spec, "blocked", "waits for films", name)
            elif whole:
                heldout = tuple(f.film_id for f in whole if (f.split or "").lower() in HELDOUT_SPLITS)
                config = settings.model_copy(update={"heldout_films": heldout})
                inputs = {kind: [self._digests[kind][f.film_id] for f in whole] for kind in spec.inputs}
                if self._settle(spec, name, _fingerprinter(self._profile, spec, config).of(inputs)):
                    self._explain(spec, config, {name: inputs})

    def _note(self, spec: StageSpec, state: str, reason: str, subject: str, due: bool = True) -> None:
        self._groups.setdefault((spec.name, state, reason, due), []).append(subject)


def _weights(profile: Profile, config: StageConfig) -> dict[str, str]:
    return identities(config.recipe_weights(), profile.engine.weights_dir)


def _fingerprinter(profile: Profile, spec: StageSpec, config: StageConfig) -> Fingerprinter:
    return Fingerprinter(spec.name, spec.version, config.recipe(), _weights(profile, config))


def _estimate(workspace: Workspace, spec: StageSpec, groups: Sequence[Group]) -> Estimate:
    """Seconds of work spread over this machine's cores."""
    count = sum(len(group.subjects) for group in groups if group.stage == spec.name and group.due)
    costs = workspace.catalog.costs(spec.output, COSTS_READ) if count else []
    cores = len(os.sched_getaffinity(0))
    share = min(spec.cpus, cores) / cores
    return estimate_cost(count, [(seconds * share, size) for seconds, size in costs])
