"""What runs, how far it is, what failed, what it has cost and what is left: for `moviedreamer status`."""

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from flows.model_registry import CHAMPION
from flows.plan import STAGES, choose_films, make_plan
from flows.profile import Profile
from flows.quarantine import find_cause
from flows.workspace import Workspace

RUNS_SHOWN = 10


def read_status(workspace: Workspace, profile: Profile) -> dict[str, Any]:
    """Everything that a person wants to know at a glance, as plain JSON values.

    Returns:
        `running` and `recent` (runs), `films`, `failed` (stage and cause, with counts), `cost` (by kind of artifact:
        `count`, `seconds`, `bytes`), `left` (by stage: subjects to compute), `left_estimate`, `champion`.
    """
    catalog = workspace.catalog
    runs = [_describe_run(row) for row in catalog.runs(RUNS_SHOWN)]
    films, chosen = choose_films(workspace, None)
    plan = make_plan(workspace, profile, films, chosen, STAGES)
    left = Counter()
    for group in plan.groups:
        left[group.stage] += len(group.subjects) if group.due else 0
    causes = Counter((row["stage"], find_cause(row["result"]["error"])) for row in catalog.failures())
    return {
        "running": [run for run in runs if run["state"] == "running"],
        "recent": [run for run in runs if run["state"] != "running"],
        "films": len(films),
        "failed": [{"stage": stage, "cause": cause, "count": count} for (stage, cause), count in causes.most_common()],
        "cost": catalog.totals(),
        "left": {stage: count for stage, count in left.items() if count},
        "left_estimate": vars(plan.total()),
        "champion": catalog.get_ref(CHAMPION),
    }


def _describe_run(row: dict[str, Any]) -> dict[str, Any]:
    begun = datetime.fromisoformat(row["started_at"])
    ended = datetime.fromisoformat(row["ended_at"] or row["beat_at"] or row["started_at"])
    end = datetime.now(UTC) if row["state"] == "running" else ended
    return {
        "id": row["id"],
        "command": row["command"],
        "state": row["state"],
        "started_at": row["started_at"],
        "seconds": round((end - begun).total_seconds(), 1),
        "progress": row["progress"] if row["state"] == "running" else None,
        "computed": row["summary"].get("computed", {}),
        "failed": len(row["summary"].get("failed", [])),
    }
