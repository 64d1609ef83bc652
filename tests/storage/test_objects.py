import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from storage.errors import ObjectCorruptError, ObjectMissingError, StoreFullError
from storage.objects import ObjectStore, StoredFile


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file.txt"
    path.write_bytes(b"hello")
    return path


def test_put_names_by_content_and_is_idempotent(store, file):
    stored = store.put(file, "part-00000.parquet", rows=3)
    assert store.put(file, "part-00000.parquet", rows=3) == stored
    assert stored.bytes == 5
    assert store.path(stored).read_bytes() == b"hello"
    assert store.keys() == [stored.key]
    assert stored.key.endswith(".parquet")


def test_verify_finds_changed_and_missing_bytes(store, file):
    stored = store.put(file, "a.txt")
    store.verify(stored)
    store.path(stored)  # a copy that was fetched earlier proves nothing about what is kept
    store.delete([stored.key])
    with pytest.raises(ObjectMissingError, match="artifacts verify"):
        store.verify(stored)
    other = StoredFile("b.txt", "0" * 64, 5)
    with pytest.raises(ObjectMissingError, match="artifacts verify"):
        store.path(other)
    store.delete([stored.key, other.key])


def test_verify_finds_changed_bytes(tmp_path, file):
    store = ObjectStore(str(tmp_path / "objects"))
    stored = store.put(file, "a.txt")
    store.path(stored).write_bytes(b"hellO")
    with pytest.raises(ObjectCorruptError, match="expected 2cf24dba"):
        store.verify(stored)


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("storage.objects.MULTIPART_BYTES", 24 << 20)
    path = tmp_path / "model.safetensors"
    path.write_bytes(random.Random(0).randbytes(30 << 20))
    store = ObjectStore("s3://films/large", tmp_path / "cache")
    stored = store.put(path, path.name)
    assert store.put(path, path.name) == stored
    store.verify(stored)
    assert store.path(stored).read_bytes() == path.read_bytes()
    (entry,) = store.objects()
    assert boto3.client("s3").head_object(Bucket="films", Key=f"large/{entry.key}")["ETag"].strip('"').endswith("-5")


def test_writers_at_once_leave_one_whole_object(store, file):
    with ThreadPoolExecutor(8) as pool:
        stored = set(pool.map(lambda _: store.put(file, "a.txt"), range(16)))
    assert len(stored) == 1
    assert len(store.keys()) == 1
    store.verify(stored.pop())


def test_file_uri_with_spaces(tmp_path, file):
    store = ObjectStore(f"file://{tmp_path}/with%20space")
    store.put(file, "a.txt")
    assert (tmp_path / "with space").is_dir()


def test_write_refused_names_remedy(tmp_path, file):
    store = ObjectStore(str(tmp_path / "objects"))
    blocked = tmp_path / "objects" / StoredFile("x", store.put(file, "a.txt").digest, 5).key[:2]
    for child in blocked.iterdir():
        child.unlink()
    blocked.rmdir()
    blocked.write_text("a file where a folder must be")
    with pytest.raises(StoreFullError, match="free some space"):
        store.put(file, "a.txt")
