"""Kills processes of an ingestion at random moments and resumes it, until it is through; then compares with one that
nobody disturbed.

    python -m tests.faults.kills FILM... [--kills 100] [--seed 0] [--every-n-frames 30] [--remote]

Victims, in turn: the command itself, the raylet, Prefect's temporary server, a Ray worker. With `--remote` the catalog
is on a Postgres server and the objects in a bucket of an S3 server, both started here. The last line is one JSON
object. Exit code 1 where the artifacts or their digests differ, or anything is listed without its bytes.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from tests.servers import run_postgres, run_s3

VICTIMS = {
    "command": "flows.cli",
    "raylet": "raylet/raylet",
    "server": "prefect.server.api.server:create_app",
    "worker": "ray::RemoteWorker",
}
LONGEST_DELAY_S = 15.0


class Ingestion:
    """The command, started again and again on one workspace."""

    def __init__(self, films: list[str], workspace: Path, settings: list[str], places: dict[str, str]) -> None:
        self._call = [sys.executable, "-m", "flows.cli", "ingest", *films, "--workspace", str(workspace)]
        self._call += [word for setting in settings for word in ("--set", setting)]
        self._workspace = workspace
        workspace.mkdir(parents=True)
        (workspace / "workspace.yaml").write_text(yaml.safe_dump(places))

    def start(self) -> subprocess.Popen[bytes]:
        """Start it in a session of its own."""
        log = (self._workspace.parent / "log").open("ab")
        with log:
            return subprocess.Popen(self._call, stdout=log, stderr=log, start_new_session=True)

    def finish(self) -> int:
        """Run it to its end; its exit code."""
        return self.start().wait()

    def query(self, *words: str) -> Any:
        """The answer of another command on the workspace."""
        call = [sys.executable, "-m", "flows.cli", *words, "--json", "--workspace", str(self._workspace)]
        return json.loads(subprocess.run(call, check=True, capture_output=True).stdout)

    def digests(self) -> dict[str, str]:
        """Artifact id to content digest."""
        return {row["id"]: row["digest"] for row in self.query("artifacts", "list")}


def find_processes(session: int, text: str) -> list[int]:
    """Processes whose command line holds a text, started by the command of that session or by its children."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in command and session in _ancestors(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


def _ancestors(pid: int) -> set[int]:
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        seen.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return seen


def disturb(ingestion: Ingestion, kills: int, draw: random.Random, done: dict[str, int]) -> None:
    """Kill and resume, until there were enough kills or the ingestion is through; counts the kills of each victim."""
    while sum(done.values()) < kills:
        process, victim = ingestion.start(), min(done, key=done.get)
        delay_s, seen = draw.uniform(0, LONGEST_DELAY_S), None
        while process.poll() is None:
            targets = find_processes(process.pid, VICTIMS[victim])
            seen = seen or (time.monotonic() if targets else None)
            if targets and seen and time.monotonic() - seen >= delay_s:
                os.kill(process.pid if victim == "command" else draw.choice(targets), signal.SIGKILL)
                done[victim] += 1
                break
            time.sleep(0.05)
        else:
            return
        killed = time.monotonic()
        code = process.wait()
        print(
            f"{sum(done.values())}: {victim} after {delay_s:.0f} s: ended with {code}, "
            f"{time.monotonic() - killed:.0f} s later",
            file=sys.stderr,
        )


def compare(calm: Ingestion, wild: Ingestion) -> dict[str, Any]:
    """What tells a disturbed ingestion that is through from the undisturbed one."""
    checked = wild.query("artifacts", "verify")
    expected, found = calm.digests(), wild.digests()
    return {
        "identical": expected == found,
        "artifacts": len(found),
        "problems": checked["problems"],
        "loose_objects": len(checked["loose"]),
        "differing": sorted(expected.items() ^ found.items())[:10],
    }


Places = Callable[[str], dict[str, str]]
"""What the `workspace.yaml` of a workspace of some name says."""


@contextmanager
def remote_places() -> Iterator[Places]:
    """A database and a prefix of a bucket for each workspace, on servers that end with the block."""
    with run_postgres() as postgres, run_s3() as variables:
        os.environ.update(variables)
        yield lambda name: {
            "catalog": f"postgresql+psycopg:{postgres.new_database()}",
            "objects": f"s3://films/{name}",
        }


def measure(
    films: list[str], kills: int, seed: int, settings: list[str], places: Places = lambda name: {}
) -> dict[str, Any]:
    """Ingest once undisturbed, and disturbed again and again until there were enough kills; compare each time."""
    draw, done, rounds = random.Random(seed), dict.fromkeys(VICTIMS, 0), []
    with tempfile.TemporaryDirectory() as folder:
        calm = Ingestion(films, Path(folder) / "calm" / "workspace", settings, places("calm"))
        calm_code = calm.finish()
        while sum(done.values()) < kills:
            name = f"wild-{len(rounds)}"
            wild = Ingestion(films, Path(folder) / name / "workspace", settings, places(name))
            disturb(wild, kills, draw, done)
            rounds.append({"exit_codes": [calm_code, wild.finish()]} | compare(calm, wild))
            print(f"ingestion {len(rounds)}: {json.dumps(rounds[-1])}", file=sys.stderr)
    return {"kills": done, "ingestions": len(rounds), "rounds": rounds}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("films", nargs="+")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-n-frames", type=int, default=30)
    parser.add_argument("--remote", action="store_true")
    call = parser.parse_args()
    films = [str(Path(film).absolute()) for film in call.films]
    settings = [f"keyframes.every_n_frames={call.every_n_frames}"]
    with remote_places() if call.remote else nullcontext(lambda name: {}) as places:
        result = measure(films, call.kills, call.seed, settings, places)
    print(json.dumps(result))
    sys.exit(0 if all(found["identical"] and not found["problems"] for found in result["rounds"]) else 1)


if __name__ == "__main__":
    main()
