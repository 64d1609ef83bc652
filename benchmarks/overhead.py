"""What Prefect, Ray, the catalog and the store cost: `moviedreamer ingest` against the bare stages, side by side.

    python benchmarks/overhead.py FILM... [--films 20] [--every-n-frames 5] [--repetitions 1] [--json]

Links the given films, in turns, under `--films` names of their own, and times two commands from outside:

* bare: the stage classes called in plain Python with the embedded profile, each film through the six film stages. As
  many processes as there are cores take films as they get free; each imports and loads a stage once, as a worker does,
  has one thread for OpenMP, as Ray sets it for an actor of one core, and hands rows on in memory. It stores nothing.
* ingest: `moviedreamer ingest` of the same films into an empty workspace, as a user types it. Where no Prefect server
  is configured, that includes starting and stopping a temporary one.

An ingestion also packs shards, which bare does not. The seconds that the catalog knows of that stage, divided by the
cores (the least that they can have taken), are subtracted from every time of an ingestion but `ingest_s`; where shards
were not spread evenly the overhead so comes out too high, never too low.

Start-up is told apart by timing both commands on tiny films: one keyframe each (the given films' first pictures), as
many films as cores, so that all workers start and all models load, but there is next to nothing to do. Both commands
do that once before, unrecorded, so that neither reads libraries and models from the disk. The last line is one JSON
object; in it

    overhead             ingestion without shards to bare, less 1
    overhead_s           the same in seconds; `fixed_overhead_s` of it are there for tiny films already
    fixed_s              the ingestion of the tiny films; bare_fixed_s: bare on them
    per_film_s           seconds a film beyond that; bare_per_film_s: the same of bare
    per_film_overhead    the one to the other, less 1: what the overhead tends to with more films; null where other
                         load on the machine made bare on tiny films the slower
    same_rows            both made the same number of rows of every film in every stage
    walls_s              every recorded run as it was timed, shards included
    stages               seconds of work in each stage, over all processes, of the last repetition: bare, and in workers
                         with reading and writing of tables. Their sum divided by the cores is the least that either
                         side can take
"""

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STAGES = ("keyframes", "people", "faces", "identities", "captions", "scripts")
BARE = "stage classes in plain Python: no Prefect, Ray, catalog, store"
CORES = len(os.sched_getaffinity(0))
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""What Ray and our executor set for a worker of one core."""

Made = dict[str, dict[str, tuple[int, float]]]
"""Film id to stage to rows and seconds of work."""


@dataclass(frozen=True)
class Side:
    """One command's run: wall seconds, of them those that shards are known to have taken, and what was made."""

    wall_s: float
    shards_s: float
    made: Made

    @property
    def net_s(self) -> float:
        """Seconds for what both sides do."""
        return self.wall_s - self.shards_s


# In the processes of the bare side


@functools.cache
def load_stage(name: str, every_n_frames: int) -> tuple[Any, Any]:
    """A stage's spec and the stage with its models, loaded once in a process."""
    from flows.profile import ExplainedProfile

    profile = ExplainedProfile("embedded", (setting(every_n_frames),)).profile
    spec = importlib.import_module(f"stages.{name}").SPEC
    return spec, spec.load()(profile.config(spec), profile.engine.weights_dir)


def process_film(path: Path, every_n_frames: int) -> dict[str, tuple[int, float]]:
    """Take a film through all stages; rows and seconds of each."""
    from stages.spec import Ok

    rows: dict[str, list[dict[str, Any]]] = {"film": [{"film_id": path.name, "uri": str(path)}]}
    told = {}
    for name in STAGES:
        started = time.perf_counter()
        spec, stage = load_stage(name, every_n_frames)
        rows[spec.output] = []
        for outcome in stage(**{kind: rows[kind] for kind in spec.inputs}):
            if isinstance(outcome, Ok):
                rows[spec.output] += outcome.rows
        told[name] = len(rows[spec.output]), time.perf_counter() - started
    return told


def process_folder(folder: Path, every_n_frames: int) -> Made:
    """All films of a folder, in as many processes as there are cores."""
    films = sorted(folder.iterdir())
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as pool:
        told = pool.map(process_film, films, itertools.repeat(every_n_frames))
        return dict(zip((film.name for film in films), told, strict=True))


# In the process that measures


def setting(every_n_frames: int) -> str:
    """The one setting that differs from the embedded profile."""
    return f"keyframes.every_n_frames={every_n_frames}"


def run_timed(command: list[str], scratch: Path, **variables: str) -> tuple[float, Any]:
    """Wall seconds of a command, and the JSON that it printed last; its output goes to files, which nobody waits on."""
    out, errors = scratch / "out", scratch / "errors"
    with out.open("wb") as stdout, errors.open("wb") as stderr:
        started = time.perf_counter()
        done = subprocess.run(command, stdout=stdout, stderr=stderr, cwd=ROOT, env=os.environ | variables)
        wall_s = time.perf_counter() - started
    if done.returncode:
        told = errors.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{told}")
    return wall_s, json.loads(out.read_text().splitlines()[-1])


def run_bare(films: Path, scratch: Path, every_n_frames: int) -> Side:
    """The bare side, in a process of its own."""
    command = [sys.executable, __file__, str(films), "--every-n-frames", str(every_n_frames), "--bare"]
    wall_s, made = run_timed(command, scratch, **ONE_THREAD)
    return Side(wall_s, 0.0, {film_id: {s: tuple(pair) for s, pair in told.items()} for film_id, told in made.items()})


def run_ingest(films: Path, scratch: Path, every_n_frames: int) -> Side:
    """The command, into a workspace of its own, and what the catalog knows of its work."""
    workspace = scratch / "workspace"
    cli = [sys.executable, "-m", "flows.cli"]
    where = ["--json", "--workspace", str(workspace)]
    wall_s, summary = run_timed([*cli, "ingest", str(films), "--set", setting(every_n_frames), *where], scratch)
    if summary["failed"]:
        raise SystemExit(f"films failed: {summary['failed']}")
    _, artifacts = run_timed([*cli, "artifacts", "list", *where], scratch)
    shutil.rmtree(workspace)
    made: Made = {film.name: {} for film in films.iterdir()}
    shards_s = 0.0
    for artifact in artifacts:
        if artifact["stage"] == "shards":
            shards_s += artifact["seconds"] / CORES
        else:
            made[artifact["subject"]][artifact["stage"]] = artifact["rows"], artifact["seconds"]
    return Side(wall_s, shards_s, made)


SIDES = {"bare": run_bare, "ingest": run_ingest}


def link_films(sources: list[Path], folder: Path, count: int) -> None:
    """Put films into a folder under names, and so film ids, of their own."""
    folder.mkdir()
    for index, source in zip(range(count), itertools.cycle(sources), strict=False):
        (folder / f"{index:04d}-{source.name}").symlink_to(source.absolute())


def cut_film(source: Path, path: Path, frames: int) -> None:
    """Write the first frames of a film as a film."""
    import av

    with av.open(str(source)) as film, av.open(str(path), "w") as cut:
        stream = None
        for frame in itertools.islice(film.decode(video=0), frames):
            width, height = frame.width // 2 * 2, frame.height // 2 * 2
            picture = frame.reformat(width, height, "yuv420p")
            picture.pts = None
            if stream is None:
                stream = cut.add_stream("libx264", rate=25)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            cut.mux(stream.encode(picture))
        cut.mux(stream.encode())


def run_all(call: argparse.Namespace, folder: Path) -> dict[tuple[str, str], list[Side]]:
    """Both sides on tiny films and on all films, in turns, after an unrecorded turn on the tiny ones."""
    cuts = [folder / f"cut-{index}.mp4" for index in range(min(CORES, len(call.films_given)))]
    for source, cut in zip(call.films_given, cuts, strict=False):
        cut_film(source, cut, call.every_n_frames)
    link_films(cuts, folder / "tiny", CORES)
    link_films(call.films_given, folder / "films", call.films)
    runs: dict[tuple[str, str], list[Side]] = {key: [] for key in itertools.product(("tiny", "films"), SIDES)}
    for turn in range(call.repetitions + 1):
        for (films, name), kept in runs.items():
            if turn or films == "tiny":
                side = SIDES[name](folder / films, folder, call.every_n_frames)
                print(f"{films}, {name}: {side.wall_s:.1f} s{'' if turn else ' (warm-up)'}", file=sys.stderr)
                kept += [side] if turn else []
    return runs


def sum_stages(bare: Made, ingested: Made) -> dict[str, dict[str, float]]:
    """Seconds of work by stage, on either side."""
    table = {}
    for name in STAGES:
        seconds = [sum(told[name][1] for told in made.values()) for made in (bare, ingested)]
        table[name] = dict(zip(("bare_s", "ingest_s"), (round(s, 2) for s in seconds), strict=True))
    return table


def have_same_rows(bare: Made, ingested: Made) -> bool:
    """Whether both sides made as many rows of every film in every stage."""
    counts = [
        {(film, stage): n for film, t in made.items() for stage, (n, _) in t.items()} for made in (bare, ingested)
    ]
    return counts[0] == counts[1]


def measure(call: argparse.Namespace) -> dict[str, Any]:
    """Run everything and compare medians."""
    with tempfile.TemporaryDirectory(prefix="moviedreamer-overhead-") as folder:
        runs = run_all(call, Path(folder))
    net = {key: statistics.median(side.net_s for side in sides) for key, sides in runs.items()}
    bare_s, ours_s = net["films", "bare"], net["films", "ingest"]
    bare_fixed_s, fixed_s = net["tiny", "bare"], net["tiny", "ingest"]
    bare_each_s, each_s = (bare_s - bare_fixed_s) / call.films, (ours_s - fixed_s) / call.films
    bare, ingested = runs["films", "bare"], runs["films", "ingest"]
    rows = {name: sum(told[name][0] for told in bare[-1].made.values()) for name in STAGES}
    return {
        "overhead": round(ours_s / bare_s - 1, 3),
        "peer": f"{BARE}; {CORES} processes",
        "same_rows": all(have_same_rows(a.made, b.made) for a, b in zip(bare, ingested, strict=True)),
        "bare_s": round(bare_s, 2),
        "ingest_s": round(statistics.median(side.wall_s for side in ingested), 2),
        "shards_s": round(statistics.median(side.shards_s for side in ingested), 2),
        "overhead_s": round(ours_s - bare_s, 2),
        "fixed_overhead_s": round(fixed_s - bare_fixed_s, 2),
        "fixed_s": round(fixed_s, 2),
        "bare_fixed_s": round(bare_fixed_s, 2),
        "per_film_s": round(each_s, 3),
        "bare_per_film_s": round(bare_each_s, 3),
        "per_film_overhead": round(each_s / bare_each_s - 1, 3) if bare_each_s > 0 else None,
        "walls_s": {" ".join(key): [round(side.wall_s, 2) for side in sides] for key, sides in runs.items()},
        "stages": sum_stages(bare[-1].made, ingested[-1].made),
        "rows": rows,
        "films": call.films,
        "every_n_frames": call.every_n_frames,
        "repetitions": call.repetitions,
        "cores": CORES,
    }


def show(result: dict[str, Any]) -> None:
    """The figures, for a person."""
    print(
        f"{result['films']} films, {result['rows']['keyframes']} keyframes, {result['cores']} cores: ingest "
        f"{result['ingest_s']} s (shards {result['shards_s']} s), bare {result['bare_s']} s, overhead "
        f"{result['overhead']:.1%} without shards"
    )
    print(
        f"fixed: {result['fixed_s']} s, bare {result['bare_fixed_s']} s; each film beyond: {result['per_film_s']} s, "
        f"bare {result['bare_per_film_s']} s"
    )
    for name, seconds in result["stages"].items():
        print(f"{name:>12}  bare {seconds['bare_s']:8.2f} s  in workers {seconds['ingest_s']:8.2f} s")


def main() -> None:
    """Parse the call, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("films_given", nargs="+", type=Path, metavar="FILM")
    parser.add_argument("--films", type=int, default=20, help="films to make of them")
    parser.add_argument("--every-n-frames", type=int, default=5, help="fewer frames apart is more work a film")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.bare:
        print(json.dumps(process_folder(call.films_given[0], call.every_n_frames)))
        return
    if missing := [film for film in call.films_given if not film.is_file()]:
        parser.error(f"no such film: {missing[0]}")
    result = measure(call)
    if not call.json:
        show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
