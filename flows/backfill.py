"""Brings what a plan finds up to date, in batches of films that can be stopped and resumed at any film."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flows.ingest import FILM_STAGES, ingest_films, pack_shards
from flows.pipeline import COMPUTABLE, Pipeline
from flows.plan import Plan, choose_films, make_plan, select_stages
from flows.sources import Source, listed_films, resolve
from stages import shards
from stages.errors import FailureBudgetError, FilmError

Reprocess = Literal["missing", "failed", "stale", "all"]
MIN_FAILURES = 3
"""A failure budget is not spent by fewer films than this: one bad film in a batch of two says little."""


@dataclass(frozen=True)
class BackfillRequest:
    """What to bring up to date.

    Attributes:
        select: Stages, see `flows.plan.select_stages`; None for all.
        films: Which films, see `flows.plan.choose_films`; None for all.
        reprocess: Films of which state; `all` leaves alone only what is fresh.
        batch_films: Films in a batch.
        backwards: Newest films first: by year where it is known, then by when they were first ingested.
    """

    select: str | None = None
    films: str | None = None
    reprocess: Reprocess = "all"
    batch_films: int = 50
    backwards: bool = False


@dataclass
class Backfill:
    """A backfill that is planned.

    Attributes:
        plan: What was found.
        batches: The films to work on.
    """

    plan: Plan
    batches: list[list[Source]]


def plan_backfill(pipeline: Pipeline, request: BackfillRequest) -> Backfill:
    """Plan, and deal the films that need work to batches. Nothing is written."""
    workspace = pipeline.workspace
    films, chosen = choose_films(workspace, request.films)
    listed = (listed_films(request.films) if request.films else None) or {}
    plan = make_plan(workspace, pipeline.profile, films, chosen, select_stages(request.select))
    states = {"missing", "failed", "stale"} if request.reprocess == "all" else {request.reprocess}
    film_stages = {spec.name for spec in FILM_STAGES}
    wanted = {s for g in plan.groups if g.state in states and g.stage in film_stages for s in g.subjects}
    rows = {row["film_id"]: row for row in workspace.catalog.films()}
    age = {film_id: (row["year"] or 0, row["created_at"]) for film_id, row in rows.items()}
    newest = max(age.values(), default=(0, ""))
    ordered = sorted(wanted, key=lambda film_id: (age.get(film_id, newest), film_id), reverse=request.backwards)
    sources = [listed.get(film_id) or _known_source(rows[film_id]) for film_id in ordered]
    size = request.batch_films
    return Backfill(plan, [sources[start : start + size] for start in range(0, len(sources), size)])


def _known_source(row: dict[str, Any]) -> Source:
    return Source(row["film_id"], row["uri"], row["title"], row["year"], row["split"])


def run_batch(pipeline: Pipeline, request: BackfillRequest, batch: Sequence[Source]) -> dict[str, int]:
    """Take one batch through the selected stages; films that failed before get another chance where asked for."""
    workspace = pipeline.workspace
    selected = {spec.name for spec in select_stages(request.select)}
    film_ids = [source.film_id for source in batch]
    known_bad = {row["subject"] for row in workspace.catalog.failures()}
    if request.reprocess in ("failed", "all"):
        workspace.catalog.forget_failures(film_ids)
    films = []
    for source in batch:
        try:
            films.append(resolve(source, workspace.catalog, workspace.folder / "cache"))
        except FilmError as error:
            pipeline.failed[source.film_id] = ("source", str(error))
    # A failure that was forgotten leaves a film missing, or stale where other settings gave a result.
    states = (request.reprocess,) if request.reprocess in COMPUTABLE else COMPUTABLE
    ingest_films(pipeline, films, [spec for spec in FILM_STAGES if spec.name in selected], states)
    failed = {film_id for film_id in film_ids if film_id in pipeline.failed}
    return {"films": len(film_ids), "failed": len(failed), "newly_failed": len(failed - known_bad)}


def check_budget(done: Sequence[dict[str, int]], budget: float | None) -> None:
    """Stop a backfill that is failing everywhere. Films that were in quarantine before do not count.

    Args:
        done: What the batches so far came to.
        budget: Share of films that may fail; None for any.

    Raises:
        FailureBudgetError: More than that failed.
    """
    films, failed = sum(batch["films"] for batch in done), sum(batch["newly_failed"] for batch in done)
    if budget is not None and failed >= MIN_FAILURES and failed > budget * films:
        raise FailureBudgetError(
            f"{failed} of {films} films failed anew, more than the failure budget of {budget:.0%}: look at "
            "`moviedreamer quarantine list`, mend the cause, and run the same command again; "
            "--set engine.failure_budget=null goes on regardless"
        )


def finish(pipeline: Pipeline, request: BackfillRequest) -> str | None:
    """Pack the shards that the films touch, where shards are selected; returns the snapshot's name."""
    if shards.SPEC not in select_stages(request.select):
        return None
    return pack_shards(pipeline)


def judge_estimate(plan: Plan, seconds: float) -> dict[str, Any]:
    """The estimate beside what the work took."""
    estimate = plan.total()
    within = None
    if estimate.seconds_low is not None and estimate.seconds_high is not None:
        within = estimate.seconds_low <= seconds <= estimate.seconds_high
    return {"estimate": asdict(estimate), "took_seconds": round(seconds, 1), "within_range": within}
