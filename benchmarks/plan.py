"""How long `moviedreamer plan` takes over many ingested films, and how much memory.

    python benchmarks/plan.py [--films 34185] [--json]

Makes a catalog in which every film is ingested (no media: a plan reads the catalog alone), then times the command as a
user would type it: with nothing changed, and with a changed setting that makes one stage of every film stale. The peer
asks the catalog about each film and stage, on a part of the films and scaled up. `ingest_s` is how long an ingestion of
all films takes to find that there is nothing to do, without the start of Python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flows.ingest import FILM_STAGES, ingest_films
from flows.pipeline import Pipeline
from flows.plan import STAGES, choose_films, make_plan
from flows.profile import ExplainedProfile, Profile
from flows.sources import Film
from flows.workspace import Workspace
from models.weights import identities
from storage.artifacts import Recipe, artifact_id, digest_json
from storage.catalog import artifact, current_ref, film, ref, utc_now
from storage.plan import decide

PEER_FILMS = 500


def recipes(profile: Profile, film_id: str, digest: str) -> Iterator[tuple[str, Recipe, str]]:
    """Kind, recipe and content digest of every artifact of an ingested film."""
    digests = {"films": digest}
    for spec in FILM_STAGES:
        config = profile.config(spec)
        weights = identities(config.recipe_weights())
        inputs = {kind: [digests.get(kind, digest)] for kind in spec.inputs}
        recipe = Recipe(spec.name, spec.version, config.recipe(), weights, inputs)
        digests[spec.output] = digest_json([film_id, spec.name])
        yield spec.output, recipe, digests[spec.output]


def fill(workspace: Workspace, profile: Profile, count: int) -> None:
    """Write films and their artifacts into the catalog, as if they had been ingested."""
    now, rows = utc_now(), {film: [], artifact: [], ref: []}
    for index in range(count):
        made = Film(f"clip-{index:06d}", f"/nowhere/{index:06d}.mp4", digest_json(index))
        facts = {"uri": made.uri, "digest": made.digest, "bytes": 1, "modified_ns": 0, "created_at": now}
        rows[film].append({"film_id": made.film_id, **facts})
        for kind, recipe, digest in recipes(profile, made.film_id, made.digest):
            made_id = artifact_id(kind, made.film_id, recipe.fingerprint)
            part = {"name": "part-00000.parquet", "digest": digest, "bytes": 1000, "rows": 1}
            values = {"id": made_id, "kind": kind, "subject": made.film_id, "fingerprint": recipe.fingerprint}
            results = {"digest": digest, "recipe": {**recipe.__dict__}, "files": [part], "counts": {}, "summary": {}}
            rows[artifact].append(values | results | {"seconds": 1.0 + index % 3, "created_at": now})
            rows[ref].append({"name": current_ref(kind, made.film_id), "target": made_id, "updated_at": now})
    with workspace.catalog._database.write() as connection:
        for table, values in rows.items():
            connection.execute(table.insert(), values)


def run_plan(workspace: Path, *settings: str) -> tuple[float, float, dict[str, Any]]:
    """Seconds, MB of memory and the answer of `moviedreamer plan --json` in a process of its own."""
    command = [sys.executable, "-m", "flows.cli", "plan", "--json", "--workspace", str(workspace), *settings]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[1]) as process:
        answer = process.stdout.read() if process.stdout else b""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024, json.loads(answer)


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Fill a catalog, in a process of its own so that its memory is not counted, and time the plans."""
    profile = ExplainedProfile("embedded").profile
    filling = [sys.executable, __file__, "--films", str(count), "--fill", str(folder)]
    subprocess.run(filling, check=True)
    workspace = Workspace.open(folder)
    cold_s, _, _ = run_plan(folder)
    unchanged_s, unchanged_mb, unchanged = run_plan(folder)
    changed_s, changed_mb, changed = run_plan(folder, "--set", "captions.max_sentences=3")
    films = [Film(row["film_id"], row["uri"], row["digest"]) for row in workspace.catalog.films()]
    started = time.perf_counter()
    for made in films[:PEER_FILMS]:
        for kind, recipe, _ in recipes(profile, made.film_id, made.digest):
            decide(workspace.catalog, kind, made.film_id, recipe)
    peer_s = (time.perf_counter() - started) * count / min(count, PEER_FILMS)
    started = time.perf_counter()
    walked = Pipeline(workspace, profile)
    ingest_films(walked, films)
    ingest_s = time.perf_counter() - started
    started = time.perf_counter()
    bulk = make_plan(workspace, profile, *choose_films(workspace, None), STAGES)
    ours_s = time.perf_counter() - started
    fresh = {row["stage"]: row["fresh"] for row in unchanged["stages"]}
    due = {row["stage"]: row["stale"] + row["blocked"] for row in changed["stages"]}
    return {
        "ratio": round(peer_s / ours_s, 1),
        "peer": f"one query a film and stage, on {min(count, PEER_FILMS)} films and scaled up",
        "same_answer": not walked.todo and all(fresh[spec.name] == count for spec in FILM_STAGES),
        "films": count,
        "artifacts": count * len(FILM_STAGES),
        "first_s": round(cold_s, 2),
        "unchanged_s": round(unchanged_s, 2),
        "unchanged_mb": round(unchanged_mb),
        "changed_s": round(changed_s, 2),
        "changed_mb": round(changed_mb),
        "changed_due": due,
        "peer_s": round(peer_s, 1),
        "ours_s": round(ours_s, 2),
        "ingest_s": round(ingest_s, 1),
        "groups": len(bulk.groups),
    }


def main() -> None:
    """Parse the call, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=34185)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.fill:
        fill(Workspace.open(call.fill), ExplainedProfile("embedded").profile, call.films)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), call.films)
    if not call.json:
        print(
            f"{result['films']} films: {result['unchanged_s']} s unchanged, {result['changed_s']} s with one "
            f"stage stale, {result['changed_mb']} MB"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
