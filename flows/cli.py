"""The `moviedreamer` command: parse, plan, call a flow, print. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done, 1 some films or stages failed (they are listed), 2 the call was wrong, 130 interrupted.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, get_args

import click

from flows.cli_artifacts import artifacts, quarantine, stage
from flows.cli_backfill import backfill, plan
from flows.cli_models import film, models, snapshot
from flows.cli_settings import doctor, profile, weights
from flows.cli_status import status
from flows.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    common,
    find_workspace,
    insist_on_interrupts,
    json_option,
    open_workspace,
    print_outcome,
    print_table,
    start_prefect,
    workspace_option,
)

model_option = click.option("--model", metavar="NAME", help="A model of `models list`; without it, the champion.")

tables_option = click.option("--tables", is_flag=True, help="Lay everything scored out as tables 1 and 2 of the paper.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moviedreamer")
def cli() -> None:
    """From films to a trained long-story model to new films."""


@cli.command()
@click.argument("films", nargs=-1, required=True, metavar="FILM...")
@click.option("--out", default="movie.mp4", show_default=True, type=click.Path(path_type=Path), help="The movie.")
@click.option("--story", type=click.Path(path_type=Path), help="A story; without one, the films' scripts are retold.")
@common
def run(films: tuple[str, ...], out: Path, story: Path | None, **common: Any) -> None:
    """All of it: ingest films, train, generate a movie, evaluate, and write a report beside the movie.

    FILM is a file, a folder, a URL, or a CSV or Parquet catalogue with columns film_id, uri.
    """
    _perform("run", films=films, story=story, out=out, report=out.with_name("report.html"), **common)


@cli.command()
@click.argument("films", nargs=-1, required=True, metavar="FILM...")
@common
def ingest(films: tuple[str, ...], **common: Any) -> None:
    """Films in, a snapshot of training shards out."""
    _perform("ingest", films=films, **common)


@cli.command()
@click.option("--snapshot", metavar="NAME", help="What to train on; without it, the newest snapshot.")
@common
def train(snapshot: str | None, **common: Any) -> None:
    """Train every model on a snapshot."""
    _perform("train", snapshot=snapshot, **common)


@cli.command()
@click.option("--snapshot", metavar="NAME", help="What to train on; without it, the newest snapshot.")
@common
def retrain(snapshot: str | None, **common: Any) -> None:
    """Train on the newest snapshot, and put the model in use where it is better than the champion.

    Better: its mean reciprocal rank on held-out keyframes exceeds the champion's by more than retrain.margin.
    """
    _perform("retrain", snapshot=snapshot, **common)


@cli.command()
@click.argument("stories", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="STORY.json...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The movie, or the folder of several; movie.mp4 or movies without it.",
)
@model_option
@click.option("--reference", "references", multiple=True, type=click.Path(path_type=Path), help="A picture to follow.")
@common
def generate(
    stories: tuple[Path, ...], out: Path | None, references: tuple[Path, ...], model: str | None, **common: Any
) -> None:
    """Stories in, movies out, with the champion, or where there is none with the newest models.

    Several stories are dreamed together, dream.batch_stories at once; each movie is called as its story.

    With --reference, keyframes follow the style and people of up to ten pictures. To go on from an ingested film, set
    dream.continue_film=FILM_ID.
    """
    out = out or Path("movie.mp4" if len(stories) == 1 else "movies")
    _perform("generate", stories=stories, out=out, references=references, model=model, **common)


@cli.command()
@model_option
@tables_option
@common
def evaluate(model: str | None, tables: bool, **common: Any) -> None:
    """Score the newest generation and the models behind it."""
    opened = _perform("evaluate", quiet=True, model=model, **common)
    _print_scores(opened, None, None, tables, common["as_json"])


@cli.command("score-pictures")
@click.argument("pictures", type=click.Path(path_type=Path), metavar="PICTURES")
@click.option("--name", required=True, help="What the system that made them is called, such as seine.")
@click.option(
    "--story", type=click.Path(path_type=Path), help="The story they tell; without it, the newest generation's."
)
@tables_option
@common
def score_pictures(pictures: Path, name: str, story: Path | None, tables: bool, **common: Any) -> None:
    """Score another system's pictures of a story as those generated here are scored.

    PICTURES is a folder with one picture a frame of the story (.jpg, .png, .webp, in the order of their names), or one
    video, which is cut into as many equal parts as the story has frames; each part gives its middle frame.
    """
    opened = _perform("score_pictures", quiet=True, pictures=pictures, name=name, story=story, **common)
    _print_scores(opened, name, story, tables, common["as_json"])


def _print_scores(opened: Any, system: str | None, story: Path | None, tables: bool, as_json: bool) -> None:
    from flows.commands import all_evaluations, evaluation_rows
    from flows.generate import story_subject
    from flows.report_tables import lay_out_tables

    if not tables:
        rows = evaluation_rows(opened, system, story_subject(story) if story else None)
        print_table(rows, as_json, ("name", "value", "unit", "better"))
        return
    laid_out = lay_out_tables(all_evaluations(opened))
    if as_json:
        click.echo(json.dumps(laid_out))
        return
    for table in laid_out:
        click.echo(f"\nTable {table['table']}: {table['title']}")
        headings = {column["name"]: column["heading"] for column in table["columns"]}
        rows = [
            {"method": row["method"], "measured by": row["measured_by"]}
            | {headings[name]: value for name, value in row["values"].items()}
            for row in table["rows"]
        ]
        print_table(rows, False, ("method", "measured by", *headings.values()))
        for note in table["notes"]:
            click.echo(note)


def _require_method(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """One of the stage's systems; looked up late, so that other commands do not wait for the stage's imports."""
    from stages.baseline import Method

    return click.Choice(get_args(Method)).convert(value, parameter, context)


@cli.command()
@click.argument("method", metavar="METHOD", callback=_require_method)
@click.option("--story", required=True, type=click.Path(path_type=Path), help="The story to paint.")
@click.option("--first", type=click.Path(path_type=Path), help="The picture that svd_chain starts from.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the movie goes; without it, the workspace alone.")
@tables_option
@common
def baseline(
    method: str,
    story: Path,
    first: Path | None,
    out: Path | None,
    tables: bool,
    settings: tuple[str, ...],
    **common: Any,
) -> None:
    """Let another system paint a story: its movie, and its numbers, to compare with.

    METHOD is frame_by_frame (SDXL without memory), consistent_attention (StoryDiffusion's on SDXL), svd_chain (Stable
    Video Diffusion, from last frame to last frame) or freenoise (FreeNoise on AnimateDiff). No trained model is needed.
    """
    chosen = [f"baseline.method={method}", *(["baseline.first_picture=given"] if first else [])]
    asked = {"story": story, "first": first, "out": out, "settings": (*settings, *chosen)}
    if common.pop("as_json"):
        _print_baseline(*_carry_out("baseline", **asked, **common)[:2], method, story, tables)
        return
    opened = _perform("baseline", as_json=False, **asked, **common)
    _print_scores(opened, method, story, tables, as_json=False)


def _print_baseline(opened: Any, summary: dict[str, Any], method: str, story: Path, tables: bool) -> None:
    """One JSON object, whether all was made or some of it failed."""
    from flows.commands import all_evaluations, evaluation_rows
    from flows.generate import story_subject
    from flows.report_tables import lay_out_tables

    told = {"movie": summary["movie"], "numbers": evaluation_rows(opened, method, story_subject(story))}
    told |= {"tables": lay_out_tables(all_evaluations(opened))} if tables else {}
    click.echo(json.dumps(told | {"failed": summary["failed"]}))
    if summary["failed"]:
        sys.exit(EXIT_FAILED)


@cli.command()
@click.option("--out", default="report.html", show_default=True, type=click.Path(path_type=Path))
@json_option
@workspace_option
def report(out: Path, as_json: bool, workspace: Path) -> None:
    """One HTML page with everything the workspace holds; it opens without a server."""
    from flows.report_data import write_report

    write_report(find_workspace(workspace), out)
    click.echo(json.dumps({"report": str(out)}) if as_json else f"report: {out}")


def _perform(command: str, as_json: bool, report: Path | None = None, quiet: bool = False, **asked: Any) -> Any:
    """Carry a command out, and print what happened."""
    started = time.perf_counter()
    opened, summary, planned = _carry_out(command, **asked)
    if report is not None and summary["movie"] and (planned or not report.is_file()):
        from flows.report_data import write_report

        write_report(opened, report)
    summary["report"] = str(report) if report else None
    summary["seconds"] = round(time.perf_counter() - started, 2)
    if not quiet or summary["failed"]:
        _print_summary(summary, as_json, nothing_to_do=not planned)
    if summary["failed"]:
        sys.exit(EXIT_FAILED)
    return opened


def _carry_out(
    command: str, profile: str, workspace: Path, settings: tuple[str, ...], **asked: Any
) -> tuple[Any, dict[str, Any], bool]:
    """Plan; start Prefect and Ray only where something is to be done.

    Returns:
        The workspace, the summary, and whether anything was to be done.
    """
    from flows.commands import Request, walk
    from flows.pipeline import Pipeline
    from flows.profile import ExplainedProfile, require_weights

    request = Request(command, **asked)
    explained = ExplainedProfile(profile, settings)
    opened = open_workspace(workspace)
    plan = Pipeline(opened, explained.profile)
    walked = walk(plan, request)
    if plan.todo:
        first = plan.todo[0]
        click.echo(f"to do: {first.stage} of {first.subject} ({first.reason}) and what follows", err=True)
        require_weights(explained.profile, _stages_of(command))
        operations = start_prefect(opened, explained.profile)
        arguments = {key: str(value) for key, value in asked.items() if isinstance(value, Path | str)}
        arguments |= {key: [str(v) for v in value] for key, value in asked.items() if isinstance(value, tuple)}
        flow = getattr(operations, command)
        summary = flow(profile=profile, workspace=str(workspace), settings=list(settings), **arguments)
    else:  # a setting that went back to an earlier value computes nothing, but makes other artifacts current
        walked = walk(Pipeline(opened, explained.profile, _compute_nothing), request)
        summary = walked.summary()
    return opened, summary, bool(plan.todo)


def _stages_of(command: str) -> list[str]:
    """The stages that a command may compute: those that look at films, the others, or both; or another system's."""
    from flows.baseline import BASELINE_STAGES
    from flows.ingest import FILM_STAGE_NAMES
    from flows.profile import Profile
    from stages.spec import StageConfig

    if command == "score_pictures":
        return ["evaluate"]
    if command == "baseline":
        return [spec.name for spec in BASELINE_STAGES]
    names = [name for name, field in Profile.model_fields.items() if isinstance(field.default, StageConfig)]
    names.remove(BASELINE_STAGES[0].name)
    looks = command in ("run", "ingest")
    return [n for n in names if command == "run" or (n in FILM_STAGE_NAMES or n == "shards") == looks]


def _compute_nothing(spec: Any, works: Any) -> Any:
    from stages.errors import MissingInputError

    raise MissingInputError(f"{spec.name} of {works[0].subject} went while this ran: run the same command again")


def _print_summary(summary: dict[str, Any], as_json: bool, nothing_to_do: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary))
        return
    if nothing_to_do:
        click.echo(f"nothing to do: {summary['fresh']} artifacts are fresh ({summary['seconds']:.1f} s)")
    print_outcome(summary)
    if decision := summary["decision"]:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in decision["scores"].items())
        verdict = "promoted" if decision["promoted"] else "not promoted"
        click.echo(f"{decision['candidate']} {verdict}{f' ({scores})' if scores else ''}: {decision['rule']}")
    for movie in summary["movies"]:
        click.echo(f"movie: {movie}")
    if summary["report"]:
        click.echo(f"report: {summary['report']}")


for _command in (
    plan, backfill, status, artifacts, quarantine, stage, snapshot, models, film, profile, weights, doctor
):  # fmt: skip
    cli.add_command(_command)


def main() -> None:
    """Entry point: turns errors into one clear line and an exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname).1s %(name)s: %(message)s")
    for chatty in ("httpx", "prefect"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    insist_on_interrupts()
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        _stop("interrupted; run the same command again to go on from here", EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to go on from here", EXIT_INTERRUPTED)
    except Exception as error:
        from flows.failures import exit_code_of

        code = exit_code_of(error)
        if code is None or sys.gettrace() is not None:  # a debugger wants to see it
            raise
        _stop(f"error: {error}", code)


def _stop(message: str, code: int) -> None:
    click.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
