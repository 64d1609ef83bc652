"""The smallest real stages: what engine and worker tests run."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from stages.errors import FilmError
from stages.spec import Fail, Inputs, Ok, Outcome, Progress, Row, Skip, StageConfig, StageSpec, neutral

NUMBERS = pa.schema([("film_id", pa.string()), ("frame_index", pa.int64()), ("value", pa.int64())])


class CountConfig(StageConfig):
    rows: int = 10
    batch: int = neutral(1, "does not matter")


class Count:
    """A film to rows. A film called `bad` cannot be used; `half` breaks in the middle."""

    def __init__(self, config: CountConfig, weights_dir: Path | None = None) -> None:
        self._config = config

    def __call__(self, *, film: list[Row]) -> Iterator[Outcome]:
        for row in film:
            if row["film_id"] == "bad":
                yield Fail("bad", "film bad is no film: replace it")
            else:
                yield Ok(row["film_id"], self._rows(row["film_id"]))

    def _rows(self, film_id: str) -> Iterator[Row]:
        for index in range(self._config.rows):
            if film_id == "half" and index == 5:
                raise FilmError("film half is truncated: fetch it again")
            yield {"film_id": film_id, "frame_index": index * 30, "value": index}


COUNT = StageSpec("count", 1, "tests.stages.tiny_stages:Count", ("film",), "count", NUMBERS, ("film_id",), "film")


class DoubleConfig(StageConfig):
    mode: str = "right"
    marker: str = ""


class Double:
    """Doubles each value; odd modes break the contract or the worker on purpose."""

    def __init__(self, config: DoubleConfig, weights_dir: Path | None = None) -> None:
        self._config = config

    def __call__(self, *, count: list[Row]) -> Iterator[Outcome]:
        mode = self._config.mode
        marker = Path(self._config.marker) if self._config.marker else None
        if mode == "die" or (mode == "die_once" and marker and not marker.exists()):
            if marker:
                marker.touch()
            os._exit(1)
        if mode == "hang":
            time.sleep(600)
        for index, row in enumerate(count):
            if mode == "forget" and index == 1:
                continue
            if mode == "skip" and index % 2:
                yield Skip(str(row["frame_index"]), "odd")
                continue
            if mode == "fail_one" and index == 0:
                yield Fail("0", "frame 0 is broken")
                continue
            if mode == "retry_once" and index == 0 and not marker.exists():
                marker.touch()
                yield Fail("0", "frame 0 came at a bad time", retryable=True)
                continue
            if mode == "interrupt" and index == 3:
                raise KeyboardInterrupt
            yield Ok(str(row["frame_index"]), [row | {"value": row["value"] * 2}])
            if mode == "twice":
                yield Ok(str(row["frame_index"]), [])
            if mode == "slow":
                time.sleep(0.2)
            if mode == "note":
                with marker.open("a") as stream:
                    stream.write(f"{row['frame_index']}\n")


DOUBLE = StageSpec("double", 1, "tests.stages.tiny_stages:Double", ("count",), "double", NUMBERS)


class TotalConfig(StageConfig):
    stop_at: int | None = None


class Total:
    """A job: adds up, keeping a checkpoint."""

    def __init__(self, config: TotalConfig, weights_dir: Path | None = None) -> None:
        self._config = config

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, int]:
        import pyarrow.parquet as pq

        checkpoint = scratch / "checkpoint.json"
        steps = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
        for path in inputs["double"][len(steps) :]:
            if self._config.stop_at == len(steps) and not (scratch / "stopped").exists():
                (scratch / "stopped").touch()
                raise RuntimeError("stopped on purpose")
            steps.append(sum(pq.read_table(path)["value"].to_pylist()))
            checkpoint.write_text(json.dumps(steps))
            progress(len(steps), len(inputs["double"]), "adding")
        (out / "total.json").write_text(json.dumps({"total": sum(steps)}))
        return {"total": sum(steps), "resumed": int((scratch / "stopped").exists())}


class TellConfig(StageConfig):
    at_once: int = neutral(3, "subjects at once")

    def subjects_at_once(self) -> int:
        return self.at_once


class Tell:
    """A job that takes several subjects at once, and tells how many there were. Odd subjects break it on purpose."""

    def __init__(self, config: TellConfig, weights_dir: Path | None = None) -> None:
        pass

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, int]:
        (came,) = self.together([(inputs, out)], progress)
        if isinstance(came, Exception):
            raise came
        return came

    def together(self, jobs: list[tuple[Inputs, Path]], progress: Progress) -> list[dict[str, int] | Exception]:
        import pyarrow.parquet as pq

        came: list[dict[str, int] | Exception] = []
        for index, (inputs, out) in enumerate(jobs):
            film = pq.read_table(inputs["count"][0])["film_id"][0].as_py()
            if film == "dies":
                os._exit(1)
            if film == "too many" and len(jobs) > 1:
                raise RuntimeError("they do not fit")
            if film == "wrong":
                came.append(FilmError("film wrong cannot be told"))
                continue
            (out / "told.txt").write_text(film)
            came.append({"at_once": len(jobs)})
            progress(index + 1, len(jobs), film)
        return came


TELL = StageSpec("tell", 1, "tests.stages.tiny_stages:Tell", ("count",), "tell", scope="set")
TOTAL = StageSpec("total", 1, "tests.stages.tiny_stages:Total", ("double",), "total", scope="set")
