"""The commands as Prefect flows. Each call computes what the catalog does not have yet, and nothing else."""

import logging
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.server.api.server import SubprocessASGIServer

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
from flows.workspace import Workspace

log = logging.getLogger(__name__)


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


def start_temporary_server() -> None:
    """Start Prefect's temporary server, deaf to Ctrl-C, which a terminal sends to every process of the command.

    The server has to outlive it by a moment: it is told how the run ended, and only then stopped by this process.
    A process inherits the signals that are blocked where it is started. Where this process is killed, so that it stops
    nothing, a shell that waits for the end of its standard input stops the server.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        server = SubprocessASGIServer()
        server.start()
        if server.server_process is not None:
            watch = ["sh", "-c", 'cat; kill "$1" 2>/dev/null', "sh", str(server.server_process.pid)]
            subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _perform(request: Request, profile: str, workspace: str, settings: list[str]) -> dict[str, Any]:
    with running(request.command, profile, workspace, settings) as pipeline:
        return walk(pipeline, request).summary()


@flow(name="run", validate_parameters=True)
def run(
    films: list[str],
    profile: str = "embedded",
    workspace: str = "./workspace",
    settings: list[str] | None = None,
    story: str | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Films in, a movie out: ingest, train, generate, evaluate."""
    request = Request("run", tuple(films), Path(story) if story else None, Path(out) if out else None)
    return _perform(request, profile, workspace, settings or [])


@flow(name="ingest", validate_parameters=True)
def ingest(
    films: list[str], profile: str = "embedded", workspace: str = "./workspace", settings: list[str] | None = None
) -> dict[str, Any]:
    """Films in, a snapshot of training shards out."""
    return _perform(Request("ingest", tuple(films)), profile, workspace, settings or [])


@flow(name="train", validate_parameters=True)
def train(
    snapshot: str | None = None,
    profile: str = "embedded",
    workspace: str = "./workspace",
    settings: list[str] | None = None,
) -> dict[str, Any]:
    """Train every model on a snapshot."""
    return _perform(Request("train", snapshot=snapshot), profile, workspace, settings or [])


@flow(name="retrain", validate_parameters=True)
def retrain(
    snapshot: str | None = None,
    profile: str = "embedded",
    workspace: str = "./workspace",
    settings: list[str] | None = None,
) -> dict[str, Any]:
    """Train on a snapshot, and put the model in use where it is better than the champion."""
    summary = _perform(Request("retrain", snapshot=snapshot), profile, workspace, settings or [])
    if decision := summary["decision"]:
        create_table_artifact(table=[decision], key="retrain-decision", description=decision["rule"])
    return summary


@flow(name="generate", validate_parameters=True)
def generate(
    story: str,
    out: str = "movie.mp4",
    references: list[str] | None = None,
    model: str | None = None,
    profile: str = "embedded",
    workspace: str = "./workspace",
    settings: list[str] | None = None,
) -> dict[str, Any]:
    """A story in, a movie out."""
    request = Request(
        "generate", story=Path(story), out=Path(out), references=tuple(map(Path, references or ())), model=model
    )
    return _perform(request, profile, workspace, settings or [])


@flow(name="evaluate", validate_parameters=True)
def evaluate(
    model: str | None = None,
    profile: str = "embedded",
    workspace: str = "./workspace",
    settings: list[str] | None = None,
) -> dict[str, Any]:
    """Score the newest generation and the models behind it."""
    return _perform(Request("evaluate", model=model), profile, workspace, settings or [])


@flow(name="backfill", validate_parameters=True)
def backfill(
    select: str | None = None,
    films: str | None = None,
    reprocess: Reprocess = "all",
    batch_films: int = 50,
    backwards: bool = False,
    profile: str = "embedded",
    workspace: str = "./workspace",
    settings: list[str] | None = None,
) -> dict[str, Any]:
    """Bring what is missing, failed or stale up to date, batch by batch."""
    request = BackfillRequest(select, films, reprocess, batch_films, backwards)
    started = time.monotonic()
    with running("backfill", profile, workspace, settings or []) as pipeline:
        planned = plan_backfill(pipeline, request)
        log.info("backfill: %d batches of films", len(planned.batches))
        done: list[dict[str, int]] = []
        for number, film_ids in enumerate(planned.batches, 1):
            batch = flow(name="backfill-batch", flow_run_name=f"batch {number} of {len(planned.batches)}")(
                lambda film_ids: run_batch(pipeline, request, film_ids)
            )
            done.append(batch(film_ids))
            check_budget(done, pipeline.profile.engine.failure_budget)
        snapshot = finish(pipeline, request)
        summary = Walked(pipeline).summary() | {"batches": done, "snapshot": snapshot}
    return summary | judge_estimate(planned.plan, time.monotonic() - started)


@flow(name="remove-film", validate_parameters=True)
def remove_film(
    film_id: str, profile: str = "embedded", workspace: str = "./workspace", settings: list[str] | None = None
) -> dict[str, Any]:
    """Take a film out, rebuild its shards without it, and delete what only it owned."""
    with running("film remove", profile, workspace, settings or []) as pipeline:
        removal = removals.remove_film(pipeline, film_id)
        newest = pipeline.workspace.catalog.get_ref(NEWEST_SNAPSHOT)
        return Walked(pipeline).summary() | removal.as_dict() | {"snapshot": newest}
