"""Immutable bytes under a URI: a local folder, or a bucket (`s3://bucket/prefix`) by way of obstore.

An object's key is its content: `ab/abcdef....parquet`. Writing the same bytes twice is the same object, so a
second writer changes nothing, and an object, once there, is whole: both kinds of store put it in place in one step.

A bucket is reached with the settings that AWS's own tools read from the environment (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`). A request that fails is sent again, with growing pauses,
for up to `PATIENCE`.
"""

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PermissionDeniedError
from obstore.store import LocalStore, from_url

from storage.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    StorageError,
    StoreFullError,
    StoreUnavailableError,
)

CHUNK_BYTES = 1 << 20
MULTIPART_BYTES = 64 << 20
"""Larger files go to a bucket in parts."""
PATIENCE = timedelta(seconds=60)
REMOTE = {
    "retry_config": {"max_retries": 12, "retry_timeout": PATIENCE},
    "client_options": {"timeout": "300s", "allow_http": True},
}


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

    Raises:
        StorageError: The URI cannot be used.
    """

    def __init__(self, uri: str, cache: Path | None = None) -> None:
        self.uri = uri
        parsed = urlparse(uri)
        self._root: Path | None = None
        if parsed.scheme in ("", "file"):
            self._root = Path(unquote(parsed.path) if parsed.scheme else uri).absolute()
            self._store = LocalStore(self._root, mkdir=True)
        else:
            try:
                self._store = from_url(uri, **REMOTE)
            except (BaseError, ValueError) as error:
                raise StorageError(f"cannot open the object store {uri}: {_first_line(error)}") from error
        self._cache = cache

    def put(self, path: Path, name: str, rows: int = 0) -> StoredFile:
        """Store a file's bytes and return how an artifact lists it.

        Raises:
            StoreFullError: The store refused the write (no space, no permission).
            StoreUnavailableError: It did not answer.
        """
        stored = StoredFile(name, digest_file(path), path.stat().st_size, rows)
        try:
            if self._root is None and stored.bytes > MULTIPART_BYTES:
                self._put_in_parts(stored, path)
            else:
                obstore.put(self._store, stored.key, path, mode="create", use_multipart=False)
        except AlreadyExistsError:
            pass
        except (BaseError, OSError) as error:
            if self._root is None and not isinstance(error, PermissionDeniedError):
                raise self._unavailable(f"write {name}", error) from error
            raise StoreFullError(
                f"cannot write {stored.bytes} bytes of {name} to {self.uri}: {_first_line(error)}; "
                "free some space or check the permissions, then run the same command again"
            ) from error
        return stored

    def _put_in_parts(self, stored: StoredFile, path: Path) -> None:
        """A writer that was quicker wrote the same bytes, so there is nothing to guard against."""
        try:
            obstore.head(self._store, stored.key)
        except (NotFoundError, FileNotFoundError):
            obstore.put(self._store, stored.key, path, use_multipart=True, chunk_size=MULTIPART_BYTES // 4)

    def path(self, stored: StoredFile) -> Path:
        """A local path of the object; a remote one is copied into the cache first.

        Raises:
            ObjectMissingError: The store does not hold it.
            StoreUnavailableError: It did not answer.
        """
        path = self._local_path(stored)
        if not path.is_file():
            if self._root is not None:
                raise ObjectMissingError(_missing(stored, self.uri))
            _write_whole(path, self._read(stored))
        return path

    def _local_path(self, stored: StoredFile) -> Path:
        if self._root is not None:
            return self._root / stored.key
        assert self._cache is not None, "a remote store needs a cache folder"
        return self._cache / stored.key

    def _read(self, stored: StoredFile) -> Iterator[bytes]:
        """The object's bytes as the store holds them."""
        with self._answering(stored):
            for chunk in obstore.get(self._store, stored.key).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    @contextmanager
    def _answering(self, stored: StoredFile) -> Iterator[None]:
        try:
            yield
        except (NotFoundError, FileNotFoundError) as error:
            raise ObjectMissingError(_missing(stored, self.uri)) from error
        except BaseError as error:
            raise self._unavailable(f"read {stored.name}", error) from error

    def _unavailable(self, what: str, error: Exception) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"cannot {what}: {self.uri} failed for {PATIENCE.total_seconds():.0f} s or for good: {_first_line(error)}; "
            "what was committed is kept: run the same command again when the store answers"
        )

    def verify(self, stored: StoredFile) -> None:
        """Read the object back from where it is kept and compare it with its name.

        Raises:
            ObjectMissingError: It is not there.
            ObjectCorruptError: Its bytes changed.
            StoreUnavailableError: The store did not answer.
        """
        hasher = hashlib.sha256()
        for chunk in self._read(stored):
            hasher.update(chunk)
        if (found := hasher.hexdigest()) != stored.digest:
            raise ObjectCorruptError(f"{stored.name} in {self.uri} has SHA-256 {found}, expected {stored.digest}")

    def ping(self) -> None:
        """Ask the store for anything at all.

        Raises:
            StoreUnavailableError: It does not answer, or not to these keys.
        """
        try:
            next(iter(obstore.list(self._store)), None)
        except BaseError as error:
            raise self._unavailable("list objects", error) from error

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

    def abort_uploads(self, before: datetime) -> int:
        """End uploads in parts that were begun before a time and never finished; returns how many.

        A process that is killed leaves the parts that it had sent; a bucket keeps them, and charges for them, until
        someone ends the upload. Other kinds of store leave nothing behind.
        """
        parsed = urlparse(self.uri)
        if parsed.scheme not in ("s3", "s3a"):
            return 0
        try:
            import boto3
        except ModuleNotFoundError:
            raise StorageError("ending unfinished uploads needs boto3: install `moviedreamer[cluster]`") from None
        client, prefix = boto3.client("s3"), parsed.path.strip("/")
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=parsed.netloc, Prefix=prefix)
        old = [u for page in pages for u in page.get("Uploads", ()) if u["Initiated"] < before]
        for upload in old:
            client.abort_multipart_upload(Bucket=parsed.netloc, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(old)


def list_bucket(prefix: str) -> list[tuple[str, int]]:
    """Name, relative to the prefix, and bytes of everything under a bucket's prefix.

    Raises:
        StoreUnavailableError: The bucket does not answer.
    """
    try:
        return [(e["path"], e["size"]) for batch in obstore.list(from_url(prefix, **REMOTE)) for e in batch]
    except (BaseError, ValueError) as error:
        raise StoreUnavailableError(
            f"cannot list {prefix}: {_first_line(error)}; check its name and the keys"
        ) from error


def download(url: str, folder: Path) -> Path:
    """A local copy of an object of a bucket; one that is there and did not change since is not fetched again.

    Raises:
        ObjectMissingError: There is no such object.
        StoreUnavailableError: The bucket does not answer.
    """
    parent, _, name = url.rpartition("/")
    try:
        store = from_url(parent, **REMOTE)
        version = obstore.head(store, name)["e_tag"]
        path = folder / hashlib.sha256(f"{url} {version}".encode()).hexdigest() / Path(name).name
        if not path.is_file():
            _write_whole(path, map(bytes, obstore.get(store, name).stream(min_chunk_size=CHUNK_BYTES)))
    except (NotFoundError, FileNotFoundError) as error:
        raise ObjectMissingError(f"{url} does not exist: correct the URL and run again") from error
    except (BaseError, ValueError) as error:
        raise StoreUnavailableError(f"cannot fetch {url}: {_first_line(error)}; check the URL and the keys") from error
    return path


def _write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that is there with all its bytes or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as stream:
        temporary = Path(stream.name)
        try:
            stream.writelines(chunks)
        except BaseException:
            temporary.unlink()
            raise
    temporary.replace(path)


def _missing(stored: StoredFile, uri: str) -> str:
    return (
        f"{stored.name} ({stored.digest[:12]}) is not in {uri}: run `moviedreamer artifacts verify` to see what else is"
    )


def _first_line(error: Exception) -> str:
    """What a person needs of an error: of a bucket's answer in XML its code and message, else the first line."""
    text = str(error).strip()
    found = [match[1] for tag in ("Code", "Message") if (match := re.search(f"<{tag}>(.*?)</{tag}>", text))]
    return (": ".join(found) or (text.splitlines() or [type(error).__name__])[0])[:300]
