"""Takes the catalog's Postgres server away in the middle of an ingestion, then the S3 server; compares with one that
nobody disturbed.

    python -m tests.faults.outages FILM... [--seconds 30] [--every-n-frames 30]

Postgres is stopped and started again; the S3 server is held still, so that requests get no answer. The last line is
one JSON object. Exit code 1 where the ingestion fails, or its artifacts or their digests differ.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.kills import Ingestion, compare, find_processes
from tests.servers import Postgres, run_postgres, run_s3


def take_away_postgres(server: Postgres, seconds: float) -> None:
    """Stop it, and start it again."""
    server.stop()
    time.sleep(seconds)
    server.start()


def hold_s3(seconds: float) -> None:
    """Let it answer nobody for a while."""
    (server,) = find_processes(os.getpid(), "bin/weed server")
    os.kill(server, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(server, signal.SIGCONT)


def disturb(ingestion: Ingestion, outages: list[Callable[[], None]]) -> int:
    """Run it; have an outage each time that there are more artifacts. Returns its exit code."""
    process, seen = ingestion.start(), 0
    for outage in outages:
        while process.poll() is None and len(ingestion.digests()) <= seen:
            time.sleep(1)
        if process.poll() is None:
            outage()
            seen = len(ingestion.digests())
    return process.wait()


def measure(films: list[str], seconds: float, settings: list[str]) -> dict[str, Any]:
    """One ingestion undisturbed, one through both outages."""
    with run_postgres() as postgres, run_s3() as variables, tempfile.TemporaryDirectory() as folder:
        os.environ.update(variables)
        calm, wild = (
            Ingestion(
                films, Path(folder) / name / "workspace", settings,
                {"catalog": f"postgresql+psycopg:{postgres.new_database()}", "objects": f"s3://films/{name}"},
            )
            for name in ("calm", "wild")
        )  # fmt: skip
        started = time.monotonic()
        calm_code, calm_s = calm.finish(), time.monotonic() - started
        started = time.monotonic()
        wild_code = disturb(wild, [lambda: take_away_postgres(postgres, seconds), lambda: hold_s3(seconds)])
        wild_s = time.monotonic() - started
        times = {"calm_s": round(calm_s, 1), "disturbed_s": round(wild_s, 1), "outages_s": 2 * seconds}
        return {"exit_codes": [calm_code, wild_code]} | times | compare(calm, wild)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("films", nargs="+")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--every-n-frames", type=int, default=30)
    call = parser.parse_args()
    films = [str(Path(film).absolute()) for film in call.films]
    result = measure(films, call.seconds, [f"keyframes.every_n_frames={call.every_n_frames}"])
    print(json.dumps(result))
    sys.exit(0 if result["identical"] and not result["problems"] and not any(result["exit_codes"]) else 1)


if __name__ == "__main__":
    main()
