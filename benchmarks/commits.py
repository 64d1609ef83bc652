"""How many results the catalog commits in a second, with 1 and with 8 writers, on SQLite and on Postgres.

    python benchmarks/commits.py [--commits 300] [--writers 1 8] [--repetitions 3] [--fsync] [--json]

A commit is what the engine asks of the catalog when a film's unit of a stage has ended: `Catalog.save_unit`, then
`Catalog.commit` (two transactions that write, one that reads back). Films go through the six stages of an ingestion,
with the recipes, files and edges that the embedded profile gives them. Each writer is a process with a catalog of its
own and films of its own; all start together, when each has opened the catalog and described its results. The seconds
run from the first writer's start to the last one's end; with repetitions they are medians. Every measurement has a
fresh database, which afterwards has to hold exactly the expected artifacts with their edges and no unit.

Both databases lie in the temporary folder (TMPDIR). Postgres is the tests' own, without fsync; `--fsync` turns it on.
The last line is one JSON object; in it

    ratio      commits a second with the most writers to those with the fewest, for each backend
    slowest_s  the longest that one commit took, in the median repetition
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flows.ingest import FILM_STAGES
from flows.profile import ExplainedProfile, Profile
from models.weights import identities
from stages.spec import StageSpec
from stages.worker import UnitResult
from storage.artifacts import Artifact, Recipe, artifact_id, content_digest, digest_json
from storage.catalog import Catalog
from storage.objects import StoredFile

PATIENCE_S = 300
SQLITE_NOTE = "WAL with synchronous=NORMAL, as the catalog sets it: synced at checkpoints, not at each commit"
POSTGRES_NOTES = {
    "off": "fsync=off, as the tests run it: a commit does not wait for the disk, as a real server's would",
    "on": "fsync=on: each commit waits until the disk has it",
}

start_line: Any = None
"""In a writer's process, the barrier at which all writers wait for each other."""


@dataclass(frozen=True)
class Job:
    """What one writer does: so many commits into the catalog under a URL, on behalf of a run."""

    url: str
    writer: int
    commits: int
    run_id: str


@dataclass(frozen=True)
class Timing:
    """When a writer started and ended, on the clock that all processes share, and its longest commit."""

    started: float
    ended: float
    slowest_s: float


def describe_film(film_id: str, profile: Profile) -> Iterator[tuple[UnitResult, Artifact]]:
    """What each stage of an ingestion makes of a film: its one unit's result, and the artifact of it."""
    made: dict[str, Artifact] = {}
    for spec in FILM_STAGES:
        inputs = {kind: made[kind] for kind in spec.inputs if kind in made}
        digests = {kind: [made[kind].digest if kind in made else digest_json(film_id)] for kind in spec.inputs}
        config = profile.config(spec)
        weights = identities(config.recipe_weights())
        recipe = Recipe(spec.name, spec.version, config.recipe(), weights, digests)
        result = _result(film_id, spec)
        made[spec.output] = Artifact(
            id=artifact_id(spec.output, film_id, recipe.fingerprint),
            kind=spec.output,
            subject=film_id,
            fingerprint=recipe.fingerprint,
            digest=content_digest(result.files),
            recipe={**recipe.__dict__},
            files=result.files,
            inputs=tuple(artifact.id for artifact in inputs.values()),
            counts=result.counts,
            seconds=result.seconds,
        )
        yield result, made[spec.output]


def _result(film_id: str, spec: StageSpec) -> UnitResult:
    """A part file and a file of rejects, as small films have them."""
    names = {"part-00000.parquet": 40, "rejects-00000.parquet": 3}
    files = [StoredFile(name, digest_json([film_id, spec.name, name]), 1000 * n, n) for name, n in names.items()]
    return UnitResult(tuple(files), {"ok": 40, "skip:no_person": 3}, seconds=2.5)


def describe_commits(writer: int, count: int) -> list[tuple[UnitResult, Artifact]]:
    """The results of one writer, film by film."""
    profile = ExplainedProfile("embedded").profile
    films = (f"clip-{writer:02d}-{index:06d}" for index in itertools.count())
    described = itertools.chain.from_iterable(describe_film(film_id, profile) for film_id in films)
    return list(itertools.islice(described, count))


def prepare_writer(barrier: Any) -> None:
    """In a writer's process: keep the barrier, which can only be handed over while a process starts."""
    global start_line
    start_line = barrier


def write(job: Job) -> Timing:
    """In a writer's process: commit everything, from the moment when all writers are ready."""
    results, catalog = describe_commits(job.writer, job.commits), Catalog(job.url)
    slowest_s = 0.0
    start_line.wait(PATIENCE_S)
    started = ended = time.monotonic()
    for result, made in results:
        key = (made.recipe["stage"], made.subject, made.fingerprint, 0)
        catalog.save_unit(key, "done", 1, result.as_dict())
        catalog.commit(made, job.run_id)
        before, ended = ended, time.monotonic()
        slowest_s = max(slowest_s, ended - before)
    catalog.close()
    return Timing(started, ended, slowest_s)


def check(catalog: Catalog, writers: int, commits: int) -> None:
    """Refuse a catalog that does not hold exactly what was committed."""
    described = [made for writer in range(writers) for _, made in describe_commits(writer, commits)]
    found = catalog.artifacts()
    if len(found) != writers * commits or {a.id: a.inputs for a in found} != {a.id: a.inputs for a in described}:
        raise SystemExit(f"the catalog holds {len(found)} artifacts or other edges, expected {writers * commits}")
    if left := catalog.unit_keys():
        raise SystemExit(f"the catalog still holds units of committed artifacts, with {len(left)} files")


def measure_once(url: str, writers: int, commits: int) -> tuple[float, float]:
    """Seconds of all writers together, and of the longest commit, in a fresh database."""
    catalog = Catalog(url)
    run_id = catalog.start_run("benchmark")
    spawn = multiprocessing.get_context("spawn")
    ready = (spawn.Barrier(writers),)
    with ProcessPoolExecutor(writers, spawn, prepare_writer, ready) as pool:
        timings = list(pool.map(write, [Job(url, writer, commits, run_id) for writer in range(writers)]))
    check(catalog, writers, commits)
    catalog.close()
    seconds = max(timing.ended for timing in timings) - min(timing.started for timing in timings)
    return seconds, max(timing.slowest_s for timing in timings)


def measure(backend: str, new_url: Callable[[], str], call: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of writers, which take turns."""
    times: dict[int, list[tuple[float, float]]] = {writers: [] for writers in call.writers}
    for _, writers in itertools.product(range(call.repetitions), call.writers):
        times[writers].append(measure_once(new_url(), writers, call.commits))
    rows = []
    for writers, pairs in times.items():
        seconds, slowest = (statistics.median(values) for values in zip(*pairs, strict=True))
        row = {"backend": backend, "writers": writers, "commits": writers * call.commits}
        row |= {"seconds": round(seconds, 2), "commits_per_s": round(writers * call.commits / seconds, 1)}
        rows.append(row | {"slowest_s": round(slowest, 3)})
    return rows


@contextmanager
def postgres(fsync: bool) -> Iterator[tuple[Callable[[], str], str]]:
    """A Postgres server: what makes a database in it and gives its URL, and its word on fsync."""
    import psycopg

    from tests import servers

    class Durable(servers.Postgres):
        def _run(self, program: str, *words: str) -> None:
            super()._run(program, *(word.replace("fsync=off", "fsync=on") for word in words))

    with patch.object(servers, "Postgres", Durable if fsync else servers.Postgres), servers.run_postgres() as server:
        with psycopg.connect(f"postgresql:{server.new_database()}") as connection:
            (setting,) = connection.execute("SHOW fsync").fetchone()
        yield lambda: f"postgresql+psycopg:{server.new_database()}", setting


def measure_all(call: argparse.Namespace) -> dict[str, Any]:
    """Both backends, one after the other."""
    with tempfile.TemporaryDirectory(prefix="moviedreamer-commits-") as folder:
        names = (f"sqlite:///{folder}/{index}.sqlite" for index in itertools.count())
        rows = measure("sqlite", lambda: next(names), call)
    with postgres(call.fsync) as (new_url, setting):
        rows += measure("postgres", new_url, call)
    rate = {(row["backend"], row["writers"]): row["commits_per_s"] for row in rows}
    few, many = min(call.writers), max(call.writers)
    return {
        "ratio": {name: round(rate[name, many] / rate[name, few], 2) for name in ("sqlite", "postgres")},
        "rows": rows,
        "note": {"sqlite": SQLITE_NOTE, "postgres": POSTGRES_NOTES[setting]},
        "commits_per_writer": call.commits,
        "repetitions": call.repetitions,
        "cores": len(os.sched_getaffinity(0)),
    }


def show(result: dict[str, Any]) -> None:
    """The table, for a person."""
    columns = list(result["rows"][0])
    for line in [columns, *(list(row.values()) for row in result["rows"])]:
        print("".join(str(cell).rjust(15) for cell in line))
    for backend, ratio in result["ratio"].items():
        print(f"{backend}: most writers to fewest {ratio}; {result['note'][backend]}")


def main() -> None:
    """Parse the call, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=int, default=300, help="commits of each writer")
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 8], help="numbers of writers to compare")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--fsync", action="store_true", help="let Postgres wait for the disk at each commit")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    call = parser.parse_args()
    result = measure_all(call)
    if not call.json:
        show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
