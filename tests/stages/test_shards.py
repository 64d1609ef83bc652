import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models import samples
from stages import captions, faces, identities, keyframes, people, scripts
from stages.shards import Shards, ShardsConfig, sample_key, shard_of
from stages.spec import no_progress

SPECS = {s.output: s for s in (keyframes.SPEC, people.SPEC, faces.SPEC, identities.SPEC, captions.SPEC, scripts.SPEC)}


def write(folder, kind, rows):
    path = folder / f"{kind}.parquet"
    schema = SPECS[kind].schema
    full = [{name: row.get(name) for name in schema.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(full, schema=pa.schema([f.with_nullable(True) for f in schema])), path)
    return [path]


@pytest.fixture
def inputs(tmp_path):
    import io

    import numpy as np
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(stream, "JPEG")
    base = {"film_id": "a.film", "time_s": 0.0, "shot_index": 0}
    frames = [base | {"frame_index": i * 30, "jpeg": stream.getvalue()} for i in range(5)]
    box = {"x0": 5.2, "y0": 3.0, "x1": 30.0, "y1": 39.5, "score": 0.9}
    face = base | box | {"frame_index": 30, "face_index": 0, "embedding": [1.0] * 384, "identity": [2.0] * 128}
    script = json.dumps({"characters": [], "scene_elements": ["This is a long shot."], "plot": []})
    return {
        "keyframes": write(tmp_path, "keyframes", frames),
        "people": write(tmp_path, "people", [base | box | {"frame_index": 30, "person_index": 0}]),
        "faces": write(tmp_path, "faces", [face]),
        "identities": write(
            tmp_path, "identities", [base | {"frame_index": 30, "face_index": 0, "character_index": 2}]
        ),
        "scripts": write(tmp_path, "scripts", [row | {"script": script} for row in frames]),
    }


def pack(inputs, out, **config):
    out.mkdir()
    summary = Shards(ShardsConfig(heldout_share=0.4, **config))(inputs, out, out, no_progress)
    return summary, list(samples.read_samples([out / "shard.tar"]))


def test_samples_hold_what_training_reads(inputs, tmp_path):
    summary, read = pack(inputs, tmp_path / "out")
    assert summary == {"samples": 5, "films": 1}
    assert [s["json"]["split"] for s in read] == ["train"] * 3 + ["heldout"] * 2
    assert read[1]["json"]["faces"][0]["character_index"] == 2
    assert (read[1]["faces.npy"].shape, read[0]["faces.npy"].shape) == ((1, 384), (0, 0))
    assert "person0.jpg" in read[1]
    assert "person0.jpg" not in read[0]
    index = {entry["name"]: entry for entry in json.loads((tmp_path / "out" / "index.json").read_text())}
    with tarfile.open(tmp_path / "out" / "shard.tar") as archive:
        assert set(index) == set(archive.getnames())
    entry = index[f"{read[0]['__key__']}.jpg"]
    data = (tmp_path / "out" / "shard.tar").read_bytes()[entry["offset"] :][: entry["bytes"]]
    assert data == read[0]["jpg"]


def test_a_test_film_is_kept_out_as_a_whole(inputs, tmp_path):
    _, read = pack(inputs, tmp_path / "out", heldout_films=("a.film",))
    assert {s["json"]["split"] for s in read} == {"test"}


def test_same_inputs_give_the_same_bytes(inputs, tmp_path):
    pack(inputs, tmp_path / "one")
    pack(inputs, tmp_path / "two")
    assert (tmp_path / "one" / "shard.tar").read_bytes() == (tmp_path / "two" / "shard.tar").read_bytes()


def test_plain_webdataset_opens_it(inputs, tmp_path):
    pack(inputs, tmp_path / "out")
    path = Path(tmp_path / "out" / "shard.tar")
    code = f"import webdataset as w; print(sum('jpg' in s for s in w.WebDataset({str(path)!r}, shardshuffle=False)))"
    variables = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True)
    assert done.stdout.strip() == "5"


def test_keys_are_safe_and_distinct():
    assert sample_key("film", 30) == "film-00000030"
    assert "." not in sample_key("../a.b", 1)
    assert sample_key("a.b", 1) != sample_key("a_b", 1)


def test_films_stay_in_their_shard():
    assert [shard_of(f"film {i}", 8) for i in range(5)] == [shard_of(f"film {i}", 8) for i in range(5)]
    assert len({shard_of(f"film {i}", 8) for i in range(200)}) == 8
