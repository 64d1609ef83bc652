"""Immutable bytes under a URI: a local folder, or a bucket (`s3://bucket/prefix`) by way of obstore.

An object's key is its content: `ab/abcdef....parquet`. Writing the same bytes twice is the same object, so a
second writer changes nothing, and an object, once there, is whole: both kinds of store put it in place in one step.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, from_url

from storage.errors import ObjectCorruptError, ObjectMissingError, StoreFullError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """A file as an artifact lists it.

    Attributes:
        name: The file's name within its artifact, such as `part-00000.parquet`.
        digest: SHA-256 of its bytes, hexadecimal.
        bytes: Its size.
        rows: Rows of a table file, else 0.
    """

    name: str
    digest: str
    bytes: int
    rows: int = 0

    @property
    def key(self) -> str:
        """Where the store keeps it."""
        return f"{self.digest[:2]}/{self.digest}{''.join(Path(self.name).suffixes[-1:])}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class StoredObject:
    """An object as the store lists it.

    Attributes:
        key: Where it is.
        bytes: Its size.
        modified: When it was written, UTC.
    """

    key: str
    bytes: int
    modified: datetime


def digest_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


class ObjectStore:
    """A store of immutable objects.

    Args:
        uri: A folder, a `file://` URI, or a URI that obstore opens (`s3://`, `gs://`, `az://`).
        cache: Folder for local copies of remote objects; unused for a local store.
    """

    def __init__(self, uri: str, cache: Path | None = None) -> None:
        self.uri = uri
        parsed = urlparse(uri)
        self._root: Path | None = None
        if parsed.scheme in ("", "file"):
            self._root = Path(unquote(parsed.path) if parsed.scheme else uri).absolute()
            self._store = LocalStore(self._root, mkdir=True)
        else:
            self._store = from_url(uri)
        self._cache = cache

    def put(self, path: Path, name: str, rows: int = 0) -> StoredFile:
        """Store a file's bytes and return how an artifact lists it.

        Raises:
            StoreFullError: The store refused the write (no space, no permission).
        """
        stored = StoredFile(name, digest_file(path), path.stat().st_size, rows)
        try:
            obstore.put(self._store, stored.key, path, mode="create")
        except AlreadyExistsError:
            pass
        except (BaseError, OSError) as error:
            raise StoreFullError(
                f"cannot write {stored.bytes} bytes of {name} to {self.uri}: {_first_line(error)}; "
                "free some space or check the permissions, then run the same command again"
            ) from error
        return stored

    def path(self, stored: StoredFile) -> Path:
        """A local path of the object; a remote one is copied into the cache first.

        Raises:
            ObjectMissingError: The store does not hold it.
        """
        if self._root is not None:
            path = self._root / stored.key
            if not path.is_file():
                raise ObjectMissingError(_missing(stored, self.uri))
            return path
        assert self._cache is not None, "a remote store needs a cache folder"
        path = self._cache / stored.key
        if not path.is_file():
            try:
                data = obstore.get(self._store, stored.key).bytes()
            except NotFoundError as error:
                raise ObjectMissingError(_missing(stored, self.uri)) from error
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.part")
            temporary.write_bytes(data)
            temporary.replace(path)
        return path

    def verify(self, stored: StoredFile) -> None:
        """Read the object back and compare it with its name.

        Raises:
            ObjectMissingError: It is not there.
            ObjectCorruptError: Its bytes changed.
        """
        found = digest_file(self.path(stored))
        if found != stored.digest:
            raise ObjectCorruptError(f"{stored.name} in {self.uri} has SHA-256 {found}, expected {stored.digest}")

    def objects(self) -> list[StoredObject]:
        """Every object in the store, by key."""
        entries = [entry for batch in obstore.list(self._store) for entry in batch]
        found = [StoredObject(entry["path"], entry["size"], entry["last_modified"]) for entry in entries]
        return sorted(found, key=lambda entry: entry.key)

    def keys(self) -> list[str]:
        """Every key in the store, sorted."""
        return [entry.key for entry in self.objects()]

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is gone already is no error."""
        for key in keys:
            try:
                obstore.delete(self._store, key)
            except (NotFoundError, FileNotFoundError):
                continue


def _missing(stored: StoredFile, uri: str) -> str:
    return (
        f"{stored.name} ({stored.digest[:12]}) is not in {uri}: run `moviedreamer artifacts verify` to see what else is"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
