"""`moviedreamer plan` and `moviedreamer backfill`."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import click

from flows.terminal import (
    EXIT_FAILED,
    common,
    describe_duration,
    open_workspace,
    print_outcome,
    print_table,
    start_prefect,
)


def _selection(command: Any) -> Any:
    """Options that choose stages and films."""
    for option in (
        click.option("--films", metavar="GLOB|FILE", help="Film ids by pattern, or those of a catalogue."),
        click.option("--select", metavar="STAGE", help="One stage; STAGE+ and what follows, +STAGE and what it needs."),
    ):
        command = option(command)
    return command


@click.command()
@_selection
@common
def plan(
    select: str | None, films: str | None, profile: str, workspace: Path, settings: tuple[str, ...], as_json: bool
) -> None:
    """What an ingestion would do, stage by stage, and why; nothing is done."""
    from flows.plan import choose_films, make_plan, select_stages
    from flows.profile import ExplainedProfile

    gc.disable()  # nothing here is garbage before the end, and looking for it takes a third of a large plan's time
    stages, settled = select_stages(select), ExplainedProfile(profile, settings).profile
    opened = open_workspace(workspace)
    found = make_plan(opened, settled, *choose_films(opened, films), stages)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
        return
    _print_plan(found)


@click.command()
@_selection
@click.option("--reprocess", type=click.Choice(["missing", "failed", "stale", "all"]), default="all", show_default=True)
@click.option("--batch-films", type=click.IntRange(min=1), default=50, show_default=True, help="Films in a batch.")
@click.option("--max-concurrent", type=click.IntRange(min=1), help="Most units at once.")
@click.option("--backwards", is_flag=True, help="Newest films first.")
@click.option("--dry-run", is_flag=True, help="Print the plan, and do nothing.")
@common
def backfill(
    profile: str, workspace: Path, settings: tuple[str, ...], as_json: bool, max_concurrent: int | None, dry_run: bool,
    **asked: Any,
) -> None:  # fmt: skip
    """Bring ingested films up to date in batches: what is missing, failed or stale under the settings now.

    It can be stopped and called again. More failures than engine.failure_budget allows stop it.
    """
    from flows.backfill import BackfillRequest, plan_backfill
    from flows.ingest import FILM_STAGE_NAMES
    from flows.pipeline import Pipeline
    from flows.profile import ExplainedProfile, require_weights

    if max_concurrent is not None:
        settings = (*settings, f"engine.max_concurrent={max_concurrent}")
    explained = ExplainedProfile(profile, settings)
    opened = open_workspace(workspace)
    planned = plan_backfill(Pipeline(opened, explained.profile), BackfillRequest(**asked))
    if dry_run:
        batches = {"batches": [len(batch) for batch in planned.batches]}
        click.echo(json.dumps(planned.plan.as_dict() | batches)) if as_json else _print_plan(planned.plan)
        return
    summary: dict[str, Any] = {"computed": {}, "reused_items": {}, "failed": [], "batches": []}
    if planned.batches or any(group.due and group.stage == "shards" for group in planned.plan.groups):
        require_weights(explained.profile, FILM_STAGE_NAMES)
        operations = start_prefect(opened, explained.profile)
        summary = operations.backfill(profile=profile, workspace=str(workspace), settings=list(settings), **asked)
    _print_backfill(summary, as_json)
    if summary["failed"]:
        sys.exit(EXIT_FAILED)


def _print_plan(found: Any) -> None:
    from flows.plan import STATES

    plain = found.as_dict()
    rows = [row | _estimate_cells(row["estimate"]) for row in plain["stages"]]
    rows.append({"stage": "all"} | _estimate_cells(plain["total"]))
    print_table(rows, False, ("stage", *STATES, "time", "range", "size"))
    for group in found.groups:
        if group.state != "fresh":
            examples = ", ".join(group.subjects[:3]) + (", ..." if len(group.subjects) > 3 else "")
            click.echo(f"{group.stage}: {len(group.subjects)} {group.state}: {group.reason} ({examples})")


def _print_backfill(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary))
        return
    if not summary["computed"] and not summary["failed"]:
        click.echo("nothing to do")
    print_outcome(summary)
    if "estimate" in summary:
        cells = _estimate_cells(summary["estimate"])
        click.echo(f"estimated {cells['time']} ({cells['range']}); it took {summary['took_seconds']:.0f} s")


def _estimate_cells(estimate: dict[str, Any]) -> dict[str, str]:
    size = estimate["bytes"]
    low, high = (describe_duration(estimate[name]) for name in ("seconds_low", "seconds_high"))
    return {
        "time": describe_duration(estimate["seconds"]),
        "range": f"{low} to {high}",
        "size": "?" if size is None else f"{size / 1e6:.1f} MB",
    }
