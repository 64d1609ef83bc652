from pathlib import Path

import pytest

from storage.errors import ObjectCorruptError, ObjectMissingError, StoreFullError
from storage.objects import ObjectStore, StoredFile


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file.txt"
    path.write_bytes(b"hello")
    return path


def test_put_names_by_content_and_is_idempotent(tmp_path, file):
    store = ObjectStore(str(tmp_path / "o b-jects"))
    stored = store.put(file, "part-00000.parquet", rows=3)
    assert store.put(file, "part-00000.parquet", rows=3) == stored
    assert stored.bytes == 5
    assert store.path(stored).read_bytes() == b"hello"
    assert store.keys() == [stored.key]
    assert stored.key.endswith(".parquet")


def test_verify_finds_changed_and_missing_bytes(tmp_path, file):
    store = ObjectStore(str(tmp_path / "objects"))
    stored = store.put(file, "a.txt")
    store.verify(stored)
    store.path(stored).write_bytes(b"hellO")
    with pytest.raises(ObjectCorruptError, match="expected 2cf24dba"):
        store.verify(stored)
    store.path(stored).unlink()
    with pytest.raises(ObjectMissingError, match="artifacts verify"):
        store.verify(stored)


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
