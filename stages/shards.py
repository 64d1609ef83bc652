"""Packs films into WebDataset shards: what training reads, and what anyone can open with plain `webdataset`.

A sample is a keyframe: `.jpg`, `.json` (script, faces, place in the film, split), `.faces.npy`, `.identities.npy` and
`.person<i>.jpg` crops. Its split is `train`, `heldout` (the end of a film: the story model is measured on it, while the
autoencoder may see it) or `test` (a film kept out of everything). The same inputs give the same bytes. Films are
dealt to shards by a stable hash, so that a new film touches one shard only.

Source: paper appendix B ("structured representation"); the format is webdataset's.
"""

import hashlib
import io
import json
import math
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from stages.spec import Inputs, Progress, Row, StageConfig, StageSpec, neutral


class ShardsConfig(StageConfig):
    """Settings of the shards stage."""

    count: int = Field(64, ge=1, description="shards in all; fixed for the life of a workspace")
    heldout_share: float = Field(0.1, ge=0, lt=1, description="share of each film, at its end, kept out of training")
    heldout_films: tuple[str, ...] = Field((), description="films kept out as a whole (catalogue split test or val)")
    crop_quality: int = Field(90, ge=1, le=100, description="JPEG quality of person crops")
    read_rows: int = neutral(64, "keyframes read at once", ge=1)


SPEC = StageSpec(
    name="shards",
    version=1,
    implementation="stages.shards:Shards",
    inputs=("keyframes", "people", "faces", "identities", "scripts"),
    output="shards",
    scope="set",
    description="WebDataset tars of keyframes with their scripts, faces and person crops",
)


def shard_of(film_id: str, count: int) -> int:
    """The shard of a film: a stable hash of its id, in `0 .. count-1`."""
    return int.from_bytes(hashlib.sha256(film_id.encode()).digest()[:8], "big") % count


def sample_key(film_id: str, frame_index: int) -> str:
    """The key of a sample. Characters that tars or webdataset give a meaning to are replaced, with a hash to tell
    two such films apart."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", film_id)
    if name != film_id:
        name = f"{name}-{hashlib.sha256(film_id.encode()).hexdigest()[:8]}"
    return f"{name}-{frame_index:08d}"


class Shards:
    """Writes one shard: `shard.tar` and `index.json`."""

    def __init__(self, config: ShardsConfig, weights_dir: Path | None = None) -> None:
        self._config = config

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Write the shard of the films whose tables are given.

        Returns:
            `samples` and `films`, counted.
        """
        from webdataset import TarWriter

        total = sum(pq.ParquetFile(path).metadata.num_rows for path in inputs["keyframes"])
        tables = {role: _by_frame(inputs[role], role) for role in ("people", "faces", "identities", "scripts")}
        last_train = self._last_train_frames(inputs["keyframes"])
        apart = set(self._config.heldout_films)
        films, done = set(), 0
        with (out / "shard.tar").open("wb") as stream, TarWriter(stream, mtime=0.0, encoder=False) as tar:
            for keyframe in self._keyframes(inputs["keyframes"]):
                where = keyframe["film_id"], keyframe["frame_index"]
                films.add(where[0])
                rows = {role: table.get(where, []) for role, table in tables.items()}
                heldout = where[1] > last_train[where[0]]
                split = "test" if where[0] in apart else "heldout" if heldout else "train"
                tar.write(self._sample(keyframe, rows, split))
                done += 1
                progress(done, total, f"sample {done} of {total}")
        (out / "index.json").write_text(json.dumps(_index(out / "shard.tar"), indent=0))
        return {"samples": done, "films": len(films)}

    def _keyframes(self, paths: list[Path]) -> Iterator[Row]:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(self._config.read_rows):
                yield from batch.to_pylist()

    def _last_train_frames(self, paths: list[Path]) -> dict[str, float]:
        """Film to the last frame index that training may see."""
        frames: dict[str, list[int]] = defaultdict(list)
        for path in paths:
            table = pq.read_table(path, columns=["film_id", "frame_index"])
            for film_id, frame in zip(table["film_id"].to_pylist(), table["frame_index"].to_pylist(), strict=True):
                frames[film_id].append(frame)
        last = {}
        for film_id, indexes in frames.items():
            kept = len(indexes) - math.floor(len(indexes) * self._config.heldout_share)
            last[film_id] = float(sorted(indexes)[kept - 1])
        return last

    def _sample(self, keyframe: Row, rows: dict[str, list[Row]], split: str) -> dict[str, Any]:
        characters = {row["face_index"]: row["character_index"] for row in rows["identities"]}
        faces = sorted(rows["faces"], key=lambda row: row["face_index"])
        facts = {name: keyframe[name] for name in ("film_id", "frame_index", "time_s", "shot_index")}
        facts["split"] = split
        facts["script"] = json.loads(rows["scripts"][0]["script"]) if rows["scripts"] else {}
        facts["faces"] = [
            {"character_index": characters.get(row["face_index"])}
            | {name: row[name] for name in ("person_index", "score", "sharpness")}
            for row in faces
        ]
        sample = {"__key__": sample_key(keyframe["film_id"], keyframe["frame_index"]), "jpg": keyframe["jpeg"]}
        sample["json"] = json.dumps(facts, sort_keys=True).encode()
        sample["faces.npy"] = _npy([row["embedding"] for row in faces])
        sample["identities.npy"] = _npy([row["identity"] for row in faces])
        return sample | self._crops(keyframe["jpeg"], rows["people"])

    def _crops(self, jpeg: bytes, people: list[Row]) -> dict[str, bytes]:
        from PIL import Image

        if not people:
            return {}
        picture = Image.open(io.BytesIO(jpeg))
        crops = {}
        for person in people:
            x0, y0 = math.floor(person["x0"]), math.floor(person["y0"])
            box = (x0, y0, max(x0 + 1, math.ceil(person["x1"])), max(y0 + 1, math.ceil(person["y1"])))
            stream = io.BytesIO()
            picture.crop(box).save(stream, "JPEG", quality=self._config.crop_quality)
            crops[f"person{person['person_index']}.jpg"] = stream.getvalue()
        return crops


def _by_frame(paths: list[Path], role: str) -> dict[tuple[str, int], list[Row]]:
    """The small columns of a table, by film and frame."""
    wanted = {
        "people": ["person_index", "x0", "y0", "x1", "y1"],
        "faces": ["face_index", "person_index", "score", "sharpness", "embedding", "identity"],
        "identities": ["face_index", "character_index"],
        "scripts": ["script"],
    }[role]
    table: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for path in paths:
        for row in pq.read_table(path, columns=["film_id", "frame_index", *wanted]).to_pylist():
            table[row["film_id"], row["frame_index"]].append(row)
    return table


def _npy(rows: list[list[float]]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(rows, np.float32) if rows else np.zeros((0, 0), np.float32), allow_pickle=False)
    return stream.getvalue()


def _index(path: Path) -> list[dict[str, Any]]:
    """Every member with where its bytes lie, for readers that want one sample and not the whole tar."""
    with tarfile.open(path) as archive:
        return [{"name": m.name, "offset": m.offset_data, "bytes": m.size} for m in archive]
