"""`moviedreamer status`."""

import json
from pathlib import Path
from typing import Any

import click

from flows.terminal import common, describe_duration, find_workspace, print_table


@click.command()
@common
def status(profile: str, workspace: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """What runs, how far it is, what failed, what it has cost, and what is left."""
    from flows.profile import ExplainedProfile
    from flows.status import read_status

    found = read_status(find_workspace(workspace), ExplainedProfile(profile, settings).profile)
    if as_json:
        click.echo(json.dumps(found))
    else:
        _print_status(found)


def _print_status(found: dict[str, Any]) -> None:
    for run in found["running"]:
        at = run["progress"]
        share = f"{at['stage']} {at['done'] / max(at['total'], 1e-9):.0%} {at['message']}" if at else "between stages"
        click.echo(f"running: {run['command']} for {describe_duration(run['seconds'])}, {share.strip()}  ({run['id']})")
    if not found["running"]:
        click.echo("nothing is running")
    click.echo(f"films: {found['films']}; champion: {found['champion'] or 'none'}")
    left = ", ".join(f"{stage} {count}" for stage, count in found["left"].items())
    seconds = found["left_estimate"]["seconds"]
    click.echo(f"left: {left or 'nothing'}{f' (about {describe_duration(seconds)})' if left and seconds else ''}")
    for row in found["failed"]:
        click.echo(f"failed: {row['count']} at {row['stage']}: {row['cause']}")
    if found["recent"]:
        click.echo("\nlast runs")
        rows = [run | {"took": describe_duration(run["seconds"])} for run in found["recent"]]
        rows = [row | {"computed": sum(row["computed"].values())} for row in rows]
        print_table(rows, False, ("command", "state", "started_at", "took", "computed", "failed"))
    if found["cost"]:
        click.echo("\ncost so far")
        rows = [
            {"kind": kind, "count": total["count"], "work": describe_duration(total["seconds"])}
            | {"size": f"{total['bytes'] / 1e6:.1f} MB"}
            for kind, total in found["cost"].items()
        ]
        print_table(rows, False, ("kind", "count", "work", "size"))
