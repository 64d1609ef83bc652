"""What is trained on, what was trained, and what is taken out: `moviedreamer snapshot`, `models` and `film`."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from flows.terminal import (
    EXIT_FAILED,
    common,
    find_workspace,
    json_option,
    print_table,
    start_prefect,
    workspace_option,
)


@click.group()
def snapshot() -> None:
    """Named, immutable lists of training shards."""


@snapshot.command("create")
@click.argument("name")
@json_option
@workspace_option
def create(name: str, as_json: bool, workspace: Path) -> None:
    """Give the newest snapshot a name; `train --snapshot NAME` trains on it whatever is ingested later."""
    from flows.snapshots import create_snapshot

    target = create_snapshot(find_workspace(workspace), name)
    click.echo(json.dumps({"name": name, "snapshot": target}) if as_json else f"{name} stands for {target}")


@snapshot.command("list")
@json_option
@workspace_option
def list_all(as_json: bool, workspace: Path) -> None:
    """Every snapshot, oldest first."""
    from flows.snapshots import list_snapshots

    rows = list_snapshots(find_workspace(workspace))
    shown = rows if as_json else [row | {"names": ", ".join(row["names"])} for row in rows]
    print_table(shown, as_json, ("snapshot", "names", "shards", "films", "created_at"))


@snapshot.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@json_option
@workspace_option
def diff(first: str, second: str, as_json: bool, workspace: Path) -> None:
    """Which shards and films tell two snapshots apart."""
    from flows.snapshots import compare_snapshots

    found = compare_snapshots(find_workspace(workspace), first, second)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name in ("films_added", "films_removed", "shards_added", "shards_removed", "shards_changed"):
        if found[name]:
            click.echo(f"{name.replace('_', ' ')}: {', '.join(found[name])}")
    click.echo(f"shards the same: {found['shards_same']}")
    for which, count in zip((first, second), found["films_gone"], strict=True):
        if count:
            click.echo(f"{count} films of {which} were removed from the workspace since")


@click.group()
def models() -> None:
    """Trained models, and which of them is in use."""


@models.command("list")
@json_option
@workspace_option
def list_all_models(as_json: bool, workspace: Path) -> None:
    """Every model, oldest first, with its newest score on held-out keyframes."""
    from flows.model_registry import list_models

    rows = list_models(find_workspace(workspace))
    print_table(rows, as_json, ("name", "role", "snapshot", "score", "scored_on", "created_at"))


@models.command("promote")
@click.argument("name", metavar="MODEL")
@json_option
@workspace_option
def promote_model(name: str, as_json: bool, workspace: Path) -> None:
    """Put a model in use, whatever its score."""
    from flows.model_registry import promote

    promote(find_workspace(workspace), name)
    click.echo(json.dumps({"champion": name}) if as_json else f"champion: {name}")


@models.command("rollback")
@json_option
@workspace_option
def roll_back_model(as_json: bool, workspace: Path) -> None:
    """Put the model before the champion in use again."""
    from flows.model_registry import roll_back

    name = roll_back(find_workspace(workspace))
    click.echo(json.dumps({"champion": name}) if as_json else f"champion: {name}")


@click.group()
def film() -> None:
    """Films of the workspace."""


@film.command("remove")
@click.argument("film_id", metavar="ID")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
def remove(
    film_id: str, dry_run: bool, yes: bool, profile: str, workspace: Path, settings: tuple[str, ...], as_json: bool
) -> None:
    """Take a film out: rebuild its shards without it, and delete what only it owned.

    Snapshots and models that saw it are named and stay.
    """
    from flows.profile import ExplainedProfile
    from flows.removal import plan_removal

    explained = ExplainedProfile(profile, settings)
    opened = find_workspace(workspace)
    found: dict[str, Any] = plan_removal(opened, film_id).as_dict()
    if not as_json:
        _print_removal(found)
    if not dry_run:
        if not yes:
            click.confirm(f"remove {film_id}?", abort=True, err=True)
        operations = start_prefect(opened, explained.profile)
        found = operations.remove_film(film_id, profile=profile, workspace=str(workspace), settings=list(settings))
    if as_json:
        click.echo(json.dumps(found | {"removed": not dry_run}))
    elif not dry_run:
        click.echo(f"removed; the newest snapshot is {found['snapshot']}")
    if found.get("failed"):
        sys.exit(EXIT_FAILED)


def _print_removal(found: dict[str, Any]) -> None:
    click.echo(f"{found['film_id']}: {len(found['artifacts'])} artifacts, {found['bytes'] / 1e6:.1f} MB of its own")
    for name, about in (
        ("shards", "shards that are rebuilt without it"),
        ("snapshots", "snapshots that hold it, and stay"),
        ("models", "trained artifacts that saw it, and stay"),
    ):
        click.echo(f"{about}: {', '.join(found[name]) or 'none'}")
