"""What the commands share: options, opening a workspace, starting Prefect, printing tables. No heavy imports."""

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
SOON_S = 0.05
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
workspace_option = click.option(
    "--workspace", default="./workspace", show_default=True, type=click.Path(path_type=Path)
)


def common(command: Any) -> Any:
    """Options of every command that works in a workspace."""
    for option in (
        json_option,
        click.option("--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="Override a setting."),
        workspace_option,
        click.option("--profile", default="embedded", show_default=True, help="A profile's name or YAML file."),
    ):
        command = option(command)
    return command


def insist_on_interrupts() -> None:
    """Let no Ctrl-C get lost.

    It is raised wherever the program happens to be. In a callback of a library that cannot pass errors on, Python tells
    of it and forgets it; then it is raised again a moment later, until it comes through.
    """

    def tell_or_raise_again(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            main = threading.main_thread().ident
            threading.Timer(SOON_S, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = tell_or_raise_again


def open_workspace(workspace: Path) -> Any:
    """The workspace in a folder, made where it is absent."""
    from flows.workspace import Workspace

    return Workspace.open(workspace)


def find_workspace(workspace: Path) -> Any:
    """The workspace in a folder.

    Raises:
        UsageError: There is none: a command that only looks makes none, so that a slip of the pen is no empty answer.
    """
    from flows.workspace import Workspace
    from stages.errors import UsageError

    if not Workspace.exists(workspace):
        raise UsageError(
            f"no workspace at {workspace}: correct --workspace, or run `moviedreamer ingest FILM...` first"
        )
    return Workspace.open(workspace)


def start_prefect(opened: Any, profile: Any) -> Any:
    """Prefect's flows, with a server to report to; imported late, because settings have to be there before Prefect.

    A server of our own, Prefect's import and Ray take seconds each, and come up side by side.
    """
    from flows.pipeline import start_cluster
    from flows.profile import prepare_prefect

    server = None
    if home := prepare_prefect(opened.folder):
        from flows.temporary_server import TemporaryServer

        server = TemporaryServer(home)
    from flows import operations

    start_cluster(profile)
    if server:
        server.wait()
    return operations


def describe_duration(seconds: float | None) -> str:
    """Seconds as a person reads them; `?` where they are not known."""
    return "?" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def print_outcome(summary: dict[str, Any]) -> None:
    """What was computed, what of it was spared, and what failed."""
    for stage, count in summary["computed"].items():
        reused = summary["reused_items"].get(stage)
        click.echo(f"{stage}: {count} computed{f' ({reused} items reused)' if reused else ''}")
    for failure in summary["failed"]:
        click.echo(f"failed: {failure['subject']} at {failure['stage']}: {failure['error']}")


def print_table(rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    """Rows as one JSON list, or as a table of some columns."""
    if as_json:
        click.echo(json.dumps(rows))
        return
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [list(columns), *cells]:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
