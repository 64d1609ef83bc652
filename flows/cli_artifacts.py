"""The commands that look at what a workspace holds: `moviedreamer artifacts ...`, `quarantine ...`, `stage ...`."""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import click

from flows.terminal import EXIT_FAILED, common, find_workspace, json_option, print_table, workspace_option


@click.group()
def artifacts() -> None:
    """What the workspace holds."""


@artifacts.command("list")
@click.option("--kind", help="Only this kind.")
@json_option
@workspace_option
def list_artifacts(kind: str | None, as_json: bool, workspace: Path) -> None:
    """Every artifact, oldest first."""
    rows = [a.as_dict() for a in find_workspace(workspace).catalog.artifacts() if kind in (None, a.kind)]
    short = [row | {"digest": row["digest"][:12]} for row in rows]
    print_table(rows if as_json else short, as_json, ("id", "subject", "rows", "bytes", "digest", "created_at"))


@artifacts.command("show")
@click.argument("artifact_id", metavar="ID")
@json_option
@workspace_option
def show_artifact(artifact_id: str, as_json: bool, workspace: Path) -> None:
    """One artifact: recipe, counts, files and where they lie."""
    from flows.lineage import get_artifact

    opened = find_workspace(workspace)
    artifact = get_artifact(opened, artifact_id)
    details = artifact.as_dict() | {
        "recipe": artifact.recipe, "counts": artifact.counts, "summary": artifact.summary,
    }  # fmt: skip
    for entry in details["files"]:
        entry["path"] = f"{opened.store.uri}/{entry['key']}"
    click.echo(json.dumps(details, indent=None if as_json else 2))


@artifacts.command()
@click.argument("artifact_id", metavar="ID")
@json_option
@workspace_option
def why(artifact_id: str, as_json: bool, workspace: Path) -> None:
    """Everything an artifact was made from, up to the films: settings, weights, versions, runs."""
    from flows.lineage import explain_artifact

    rows = explain_artifact(find_workspace(workspace), artifact_id)
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        run = f"{row['run']['command']} {row['run']['id']}" if row["run"] else "no run"
        settings = " ".join(f"{name}={json.dumps(value)}" for name, value in row["config"].items())
        indent = "  " * row["depth"]
        version = f"{row['stage']} version {row['stage_version']}"
        click.echo(f"{indent}{row['id']} of {row['subject']}: {version}, {run}, {row['created_at']}")
        for name, value in (("settings", settings), ("weights", ", ".join(row["weights"]))):
            if value:
                click.echo(f"{indent}  {name}: {value}")
        if row["source"]:
            click.echo(f"{indent}  film: {row['source']['uri']} (SHA-256 {row['source']['digest'][:12]})")


@artifacts.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@json_option
@workspace_option
def diff(first: str, second: str, as_json: bool, workspace: Path) -> None:
    """What differs between two artifacts, in recipe and in content."""
    from flows.lineage import compare_artifacts

    found = compare_artifacts(find_workspace(workspace), first, second)
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"recipe: {'the same' if found['same_recipe'] else found['recipe']}")
    click.echo(
        f"content: {'the same' if found['same_content'] else 'differs'}; rows {found['rows'][0]} and {found['rows'][1]}"
    )
    for name in ("files_removed", "files_added", "files_changed"):
        if found[name]:
            click.echo(f"{name.replace('_', ' ')}: {', '.join(found[name])}")


@artifacts.command()
@json_option
@workspace_option
def verify(as_json: bool, workspace: Path) -> None:
    """Read every file of every artifact and compare it with its digest; name objects that no artifact lists."""
    from storage.errors import StorageError
    from storage.garbage import find_loose_objects

    opened = find_workspace(workspace)
    checked, problems = {}, []
    for artifact in opened.catalog.artifacts():
        for stored in artifact.files:
            if stored.digest not in checked:
                try:
                    opened.store.verify(stored)
                    checked[stored.digest] = None
                except StorageError as error:
                    checked[stored.digest] = str(error)
            if checked[stored.digest]:
                problems.append({"artifact": artifact.id, "file": stored.name, "problem": checked[stored.digest]})
    loose = find_loose_objects(opened.catalog, opened.store)
    if as_json:
        click.echo(json.dumps({"files": len(checked), "problems": problems, "loose": [entry.key for entry in loose]}))
    else:
        for problem in problems:
            click.echo(f"{problem['artifact']}: {problem['problem']}")
        if loose:
            size = sum(entry.bytes for entry in loose) / 1e6
            click.echo(f"{len(loose)} objects of no artifact, {size:.1f} MB: `moviedreamer artifacts gc` removes them")
        click.echo(f"{len(checked)} files read, {len(problems)} problems")
    sys.exit(EXIT_FAILED if problems else 0)


@artifacts.command()
@click.option(
    "--keep",
    "keep_days",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    metavar="DAYS",
    help="Leave alone what is younger than this.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@json_option
@workspace_option
def gc(keep_days: float, dry_run: bool, as_json: bool, workspace: Path) -> None:
    """Remove artifacts that no ref and no snapshot reaches, and objects that no artifact lists."""
    from storage.garbage import find_garbage, remove_garbage

    opened = find_workspace(workspace)
    garbage = find_garbage(opened.catalog, opened.store, timedelta(days=keep_days))
    uploads = 0 if dry_run else remove_garbage(opened.catalog, opened.store, garbage)
    found = {
        "artifacts": [artifact.id for artifact in garbage.artifacts], "objects": len(garbage.objects),
        "bytes": garbage.bytes, "removed": not dry_run, "uploads_ended": uploads,
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(found))
        return
    for artifact in garbage.artifacts:
        click.echo(f"{artifact.id} of {artifact.subject}, {artifact.created_at}")
    verb = "would go" if dry_run else "removed"
    click.echo(
        f"{len(garbage.artifacts)} artifacts, {len(garbage.objects)} objects, {garbage.bytes / 1e6:.1f} MB {verb}"
    )


@click.group()
def quarantine() -> None:
    """What failed, why, and another try."""


@quarantine.command("list")
@json_option
@workspace_option
def list_quarantine(as_json: bool, workspace: Path) -> None:
    """Failures by stage and cause, the most frequent first."""
    from flows.quarantine import cluster, list_failures

    failures = list_failures(find_workspace(workspace))
    rows = [failure.as_dict() for failure in failures] if as_json else cluster(failures)
    print_table(rows, as_json, ("stage", "count", "attempts", "first_seen", "last_seen", "cause", "example"))


@quarantine.command("show")
@click.argument("subject", metavar="FILM")
@json_option
@workspace_option
def show_quarantine(subject: str, as_json: bool, workspace: Path) -> None:
    """Every failure of a film: the error, the unit's input files, the versions in force."""
    from flows.quarantine import list_failures
    from stages.errors import UsageError

    rows = [failure.as_dict() for failure in list_failures(find_workspace(workspace)) if failure.subject == subject]
    if not rows:
        raise UsageError(f"nothing of '{subject}' is in quarantine: `moviedreamer quarantine list --json` names all")
    click.echo(json.dumps(rows, indent=None if as_json else 2))


@quarantine.command("retry")
@click.option("--cause", help="Part of a cause as `quarantine list` prints it; without it, all.")
@json_option
@workspace_option
def retry_quarantine(cause: str | None, as_json: bool, workspace: Path) -> None:
    """Let what failed be tried again by the next ingestion or backfill."""
    from flows.quarantine import release

    subjects = release(find_workspace(workspace), cause)
    if as_json:
        click.echo(json.dumps({"released": subjects}))
    else:
        click.echo(f"{len(subjects)} released: `moviedreamer backfill` tries them again")


@click.group()
def stage() -> None:
    """One stage by itself."""


@stage.command("replay")
@click.argument("unit", metavar="STAGE/SUBJECT[#INDEX]")
@click.option("--out", default="replay", show_default=True, type=click.Path(path_type=Path), help="For its files.")
@common
def replay_unit(unit: str, out: Path, profile: str, workspace: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Run one unit in the foreground, on exactly the inputs that it failed on; nothing is committed.

    For a debugger: `python -m pdb -m flows.cli stage replay people/film.mp4#0`.
    """
    from flows.failures import exit_code_of
    from flows.profile import ExplainedProfile
    from flows.replay import replay
    from stages.errors import UsageError

    opened, settled = find_workspace(workspace), ExplainedProfile(profile, settings).profile
    try:
        done = replay(opened, settled, unit, out)
    except Exception as error:
        if exit_code_of(error) is not None and not isinstance(error, UsageError):
            traceback.print_exc()  # what is one line elsewhere is looked for here
        raise
    if as_json:
        click.echo(json.dumps(done))
        return
    counts = ", ".join(f"{count} {outcome}" for outcome, count in done["counts"].items())
    click.echo(f"{done['stage']} of {done['subject']}, unit {done['unit']}: {counts}; {done['seconds']} s")
    for row in done["rejects"]:
        click.echo(f"item {row['item']}: {row['outcome']}: {row['reason']}")
    for path in done["files"]:
        click.echo(path)
