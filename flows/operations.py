"""The commands as Prefect flows. Each call computes what the catalog does not have yet, and nothing else."""

import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event
from prefect.states import Completed
from pydantic import Field

from flows import removal as removals
from flows.backfill import (
    BackfillRequest,
    Reprocess,
    check_budget,
    finish,
    judge_estimate,
    plan_backfill,
    run_batch,
)
from flows.commands import Request, Walked, walk
from flows.heartbeat import Heartbeat
from flows.ingest import NEWEST_SNAPSHOT
from flows.metrics import Metrics
from flows.pipeline import Pipeline, open_executor
from flows.profile import ExplainedProfile
from flows.tasks import Watch, make_runner
from flows.watch import EVENT, find_new_films
from flows.workspace import Workspace

Films = Annotated[list[str], Field(min_length=1)]
Name = Annotated[str, Field(min_length=1)]
Settings = list[Annotated[str, Field(pattern=r"^[a-z_]+\.[^=]+=")]] | None

PARAMETERS = {
    "films": "Files, folders, URLs, prefixes of buckets, or catalogues (for a backfill: a pattern or a catalogue)",
    "profile": "A profile's name, or the path of a YAML file",
    "workspace": "The workspace's folder; a workspace.yaml in it names a shared catalog and bucket",
    "settings": "Overrides, such as people.max_people=3. No secrets: parameters are kept in plain text",
    "snapshot": "What to train on, by name; the newest where it is left out",
    "model": "What to generate with, by name; the champion where it is left out",
    "story": "The story's JSON file",
    "stories": "JSON files of stories",
    "out": "Where the movie goes; of several stories, the folder of their movies",
    "first": "The picture that svd_chain starts from; SDXL makes one where it is left out",
    "references": "Pictures whose style and people the keyframes follow",
    "select": "STAGE, STAGE+ with what follows, or +STAGE with what it needs; all where it is left out",
    "reprocess": "Which films to bring up to date",
    "batch_films": "Films in a batch",
    "backwards": "Newest films first",
    "film_id": "The film to remove",
    "place": "A folder, or a prefix of a bucket such as s3://bucket/films/",
    "pictures": "Another system's pictures of the story: a folder with one a frame, or a video",
    "name": "What that system is called",
    "settle_s": "A file that changed within so many seconds is still being copied, and waits",
}
"""What Prefect's form in the browser says of each parameter."""

log = logging.getLogger(__name__)


def operation(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function a Prefect flow whose parameters are validated, and described in the form in the browser."""

    def decorate(function: Callable[..., Any]) -> Any:
        about = "\n".join(f"    {word}: {PARAMETERS[word]}" for word in inspect.signature(function).parameters)
        function.__doc__ = f"{function.__doc__}\n\nArgs:\n{about}\n"

        @functools.wraps(function)
        def run_and_judge(*args: Any, **kwargs: Any) -> Any:
            return _judge(function(*args, **kwargs))

        return flow(name=name, validate_parameters=True)(run_and_judge)

    return decorate


def _judge(summary: Any) -> Any:
    """A run in which films failed says so on its page; it is no failed run, because the others went through."""
    failed = summary["failed"] if isinstance(summary, dict) else []
    if not failed:
        return summary
    first = failed[0]
    message = f"{len(failed)} failed, such as {first['subject']} at {first['stage']}: {first['error']}"
    return Completed(name="CompletedWithFailures", message=message[:1000], data=summary)


@contextmanager
def running(command: str, profile: str, workspace: str, settings: list[str]) -> Iterator[Pipeline]:
    """A pipeline that computes, with its workers, noted as a run in the catalog."""
    explained = ExplainedProfile(profile, tuple(settings))
    opened = Workspace.open(Path(workspace))
    run_id = opened.catalog.start_run(command)
    heartbeat = Heartbeat(opened.catalog, run_id)
    state, pipeline = "failed", Pipeline(opened, explained.profile, run_id=run_id)
    executor, metrics = None, None
    try:
        metrics = Metrics(explained.profile.engine.metrics_address)
        executor = open_executor(opened, explained.profile)
        pipeline.runner = make_runner(opened, executor, run_id, Watch(heartbeat, metrics))
        yield pipeline
        state = "done"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        heartbeat.close()
        opened.catalog.end_run(run_id, state, Walked(pipeline).summary())
        for part in (executor, metrics):
            if close := getattr(part, "close", None):
                close()
        opened.catalog.close()


def _perform(request: Request, profile: str, workspace: str, settings: list[str]) -> dict[str, Any]:
    with running(request.command, profile, workspace, settings) as pipeline:
        return walk(pipeline, request).summary()


@operation("run")
def run(
    films: Films,
    profile: Name = "embedded",
    workspace: Name = "./workspace",
    settings: Settings = None,
    story: str | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Films in, a movie out: ingest, train, generate, evaluate."""
    request = Request("run", tuple(films), story=Path(story) if story else None, out=Path(out) if out else None)
    return _perform(request, profile, workspace, settings or [])


@operation("ingest")
def ingest(
    films: Films, profile: Name = "embedded", workspace: Name = "./workspace", settings: Settings = None
) -> dict[str, Any]:
    """Films in, a snapshot of training shards out."""
    return _perform(Request("ingest", tuple(films)), profile, workspace, settings or [])


@operation("train")
def train(
    snapshot: Name | None = None,
    profile: Name = "embedded",
    workspace: Name = "./workspace",
    settings: Settings = None,
) -> dict[str, Any]:
    """Train every model on a snapshot."""
    return _perform(Request("train", snapshot=snapshot), profile, workspace, settings or [])


@operation("retrain")
def retrain(
    snapshot: Name | None = None,
    profile: Name = "embedded",
    workspace: Name = "./workspace",
    settings: Settings = None,
) -> dict[str, Any]:
    """Train on a snapshot, and put the model in use where it is better than the champion."""
    summary = _perform(Request("retrain", snapshot=snapshot), profile, workspace, settings or [])
    if decision := summary["decision"]:
        create_table_artifact(table=[decision], key="retrain-decision", description=decision["rule"])
    return summary


@operation("generate")
def generate(
    stories: Annotated[list[Name], Field(min_length=1)],
    out: Name = "movie.mp4",
    references: list[str] | None = None,
    model: Name | None = None,
    profile: Name = "embedded",
    workspace: Name = "./workspace",
    settings: Settings = None,
) -> dict[str, Any]:
    """Stories in, movies out."""
    request = Request(
        "generate",
        stories=tuple(map(Path, stories)),
        out=Path(out),
        references=tuple(map(Path, references or ())),
        model=model,
    )
    return _perform(request, profile, workspace, settings or [])


@operation("evaluate")
def evaluate(
    model: Name | None = None,
    profile: Name = "embedded",
    workspace: Name = "./workspace",
    settings: Settings = None,
) -> dict[str, Any]:
    """Score the newest generation and the models behind it."""
    return _perform(Request("evaluate", model=model), profile, workspace, settings or [])


@operation("score-pictures")
def score_pictures(
    pictures: Name,
    name: Name,
    story: str | None = None,
    profile: Name = "embedded",
    workspace: Name = "./workspace",
    settings: Settings = None,
) -> dict[str, Any]:
    """Score another system's pictures of a story as those generated here are scored."""
    request = Request("score_pictures", story=Path(story) if story else None, pictures=Path(pictures), name=name)
    return _perform(request, profile, workspace, settings or [])


@operation("baseline")
def baseline(
    story: Name,
    out: str | None = None,
    first: str | None = None,
    profile: Name = "embedded",
    workspace: Name = "./workspace",
    settings: Settings = None,
) -> dict[str, Any]:
    """A story in, the movie and the numbers of another system out: the one that the setting baseline.method names."""
    request = Request(
        "baseline", story=Path(story), out=Path(out) if out else None, first=Path(first) if first else None
    )
    return _perform(request, profile, workspace, settings or [])


@operation("backfill")
def backfill(
    select: str | None = None,
    films: str | None = None,
    reprocess: Reprocess = "all",
    batch_films: Annotated[int, Field(ge=1)] = 50,
    backwards: bool = False,
    profile: Name = "embedded",
    workspace: Name = "./workspace",
    settings: Settings = None,
) -> dict[str, Any]:
    """Bring what is missing, failed or stale up to date, batch by batch."""
    request = BackfillRequest(select, films, reprocess, batch_films, backwards)
    started = time.monotonic()
    with running("backfill", profile, workspace, settings or []) as pipeline:
        planned = plan_backfill(pipeline, request)
        log.info("backfill: %d batches of films", len(planned.batches))
        done: list[dict[str, int]] = []
        for number, films_of_batch in enumerate(planned.batches, 1):
            run_now = partial(run_batch, pipeline, request, films_of_batch)
            done.append(_backfill_batch(f"batch {number} of {len(planned.batches)}", run_now))
            check_budget(done, pipeline.profile.engine.failure_budget)
        snapshot = finish(pipeline, request)
        summary = Walked(pipeline).summary() | {"batches": done, "snapshot": snapshot}
    return summary | judge_estimate(planned.plan, time.monotonic() - started)


def _backfill_batch(name: str, run_now: Callable[[], dict[str, int]]) -> dict[str, int]:
    """One batch as a subflow. What it works with is too big for a parameter, which Prefect would keep."""

    @flow(name="backfill-batch", flow_run_name=name)
    def batch() -> dict[str, int]:
        return run_now()

    return batch()


@operation("remove-film")
def remove_film(
    film_id: Name, profile: Name = "embedded", workspace: Name = "./workspace", settings: Settings = None
) -> dict[str, Any]:
    """Take a film out, rebuild its shards without it, and delete what only it owned."""
    with running("film remove", profile, workspace, settings or []) as pipeline:
        removal = removals.remove_film(pipeline, film_id)
        newest = pipeline.workspace.catalog.get_ref(NEWEST_SNAPSHOT)
        return Walked(pipeline).summary() | removal.as_dict() | {"snapshot": newest}


@operation("watch")
def watch(
    place: Name,
    settle_s: Annotated[float, Field(ge=0)] = 60.0,
    profile: Name = "embedded",
    workspace: Name = "./workspace",
    settings: Settings = None,
) -> list[str]:
    """Say in an event that films appeared in a place; the deployment `ingest` answers it."""
    opened = Workspace.open(Path(workspace))
    found = find_new_films(opened, place, settle_s)
    opened.catalog.close()
    if found:
        payload = {"films": [place], "new": found[:100], "count": len(found), "profile": profile}
        payload |= {"workspace": workspace, "settings": settings or []}
        emit_event(EVENT, resource={"prefect.resource.id": f"moviedreamer.place.{place}"}, payload=payload)
    return found
