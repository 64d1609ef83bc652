import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import webdataset

from models.samples import read_samples


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def test_members_are_decoded_by_name(tmp_path):
    path = tmp_path / "a {1..2} shard.tar"
    with path.open("wb") as stream, webdataset.TarWriter(stream, mtime=0.0, encoder=False) as tar:
        for index in range(3):
            faces = npy(np.full((index, 4), index, np.float32))
            facts = json.dumps({"frame_index": index}).encode()
            tar.write({"__key__": f"film-{index:08d}", "jpg": b"jpeg", "json": facts, "faces.npy": faces})
    samples = list(read_samples([path, path]))
    assert [s["json"]["frame_index"] for s in samples] == [0, 1, 2, 0, 1, 2]
    assert samples[2]["faces.npy"].shape == (2, 4)
    assert samples[0]["jpg"] == b"jpeg"


def test_code_in_a_shard_never_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    members = {"film-0.pyd": pickle.dumps(Bomb()), "film-0.faces.npy": pickle.dumps(Bomb())}
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match="pickled"):
        list(read_samples([tmp_path / "shard.tar"]))


def test_no_shards_no_samples():
    assert list(read_samples([])) == []
