"""What an artifact is: its recipe, its fingerprint, its content, and the tables it holds."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.objects import ObjectStore, StoredFile

ROW_GROUP_ROWS = 64

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a computation gives.

    Attributes:
        stage: The stage's name.
        version: The stage's version.
        config: The settings that change results.
        weights: Name to digest of the weights used.
        inputs: Role to the content digests of the artifacts read, in order.
    """

    stage: str
    version: int
    config: Mapping[str, Any]
    weights: Mapping[str, str]
    inputs: Mapping[str, Sequence[str]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe in canonical JSON."""
        return Fingerprinter(self.stage, self.version, self.config, self.weights).of(self.inputs)


class Fingerprinter:
    """Fingerprints of recipes that differ in their inputs alone: a plan makes one for every film and stage.

    Args:
        stage, version, config, weights: As of a `Recipe`.
    """

    def __init__(self, stage: str, version: int, config: Mapping[str, Any], weights: Mapping[str, str]) -> None:
        self._before = f'{{"config":{_canonical(config)},"inputs":'
        self._after = f',"stage":{_canonical(stage)},"version":{version},"weights":{_canonical(weights)}}}'

    def of(self, inputs: Mapping[str, Sequence[str]]) -> str:
        """The fingerprint of the recipe with these inputs."""
        return hashlib.sha256((self._before + _canonical(inputs) + self._after).encode()).hexdigest()

    def with_roles(self, roles: Iterable[str]) -> Callable[[Sequence[str]], str]:
        """A quick `of` for inputs of one artifact a role: takes their digests, in the order of the sorted roles."""
        before, after = (text.replace("%", "%%") for text in (self._before, self._after))
        pattern = f"{before}{{{','.join(f'{_canonical(role)}:[%s]' for role in sorted(roles))}}}{after}"
        pattern = pattern.replace("[%s]", '["%s"]')
        return lambda digests: hashlib.sha256((pattern % tuple(digests)).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A committed result.

    Attributes:
        id: `<kind>-<12 hex digits>`, unique.
        kind: What it holds (`keyframes`, `people`, ...).
        subject: What it is about: a film id, a shard, a snapshot, a story.
        fingerprint: Digest of `recipe`.
        digest: Digest of the content, the same for the same files.
        recipe: How it was made.
        files: Its files, in order.
        inputs: Ids of the artifacts it was made from.
        counts: Items by outcome, for example `{"ok": 40, "skip:no_person": 3}`.
        summary: What a job said of its result.
        seconds: Seconds of work.
        created_at: UTC, ISO 8601.
    """

    id: str
    kind: str
    subject: str
    fingerprint: str
    digest: str
    recipe: dict[str, Any]
    files: tuple[StoredFile, ...]
    inputs: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    created_at: str = ""

    @property
    def tables(self) -> tuple[StoredFile, ...]:
        """The part files of its table."""
        return tuple(f for f in self.files if f.name.startswith("part-"))

    @property
    def results(self) -> tuple[StoredFile, ...]:
        """All files but those that list rejected items."""
        return tuple(f for f in self.files if not f.name.startswith("rejects-"))

    @property
    def rows(self) -> int:
        """Rows of the artifact's table."""
        return sum(f.rows for f in self.tables)

    def file(self, name: str) -> StoredFile:
        """The file called `name`."""
        return next(f for f in self.files if f.name == name)

    def as_dict(self) -> dict[str, Any]:
        """The public description, as `artifacts list --json` prints it."""
        return {
            "id": self.id,
            "kind": self.kind,
            "subject": self.subject,
            "fingerprint": self.fingerprint,
            "digest": self.digest,
            "stage": self.recipe["stage"],
            "stage_version": self.recipe["version"],
            "rows": self.rows,
            "bytes": sum(f.bytes for f in self.files),
            "files": [f.as_dict() | {"key": f.key} for f in self.files],
            "inputs": list(self.inputs),
            "created_at": self.created_at,
            "seconds": round(self.seconds, 3),
        }


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def artifact_id(kind: str, subject: str, fingerprint: str) -> str:
    """The id under which a result is committed."""
    return f"{kind}-{digest_json([subject, fingerprint])[:12]}"


def content_digest(files: Iterable[StoredFile]) -> str:
    """The digest of an artifact's content: names and bytes of its files, in order."""
    return digest_json([[f.name, f.digest] for f in files])


class TableWriter:
    """Writes rows to Parquet part files of bounded size, the same bytes for the same rows.

    Args:
        folder: Where the part files are made before they are stored.
        schema: Columns of the table.
        prefix: Start of each file's name.
        part_rows: Rows of a part file at the most; downstream workers take one part at a time.
    """

    def __init__(self, folder: Path, schema: pa.Schema, prefix: str, part_rows: int) -> None:
        self._folder, self._schema, self._prefix, self._part_rows = folder, schema, prefix, part_rows
        self._buffer: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._rows = 0
        self.parts: list[tuple[Path, int]] = []

    def write(self, row: dict[str, Any]) -> None:
        """Add one row."""
        self._buffer.append(row)
        if len(self._buffer) >= ROW_GROUP_ROWS or self._rows + len(self._buffer) >= self._part_rows:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            path = self._folder / f"{self._prefix}-{len(self.parts):05d}.parquet"
            self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
            self.parts.append((path, 0))
        self._writer.write_table(pa.Table.from_pylist(self._buffer, schema=self._schema))
        self._rows += len(self._buffer)
        self.parts[-1] = (self.parts[-1][0], self._rows)
        self._buffer = []
        if self._rows >= self._part_rows:
            self._close_part()

    def _close_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._rows = None, 0

    def close(self, keep_empty: bool = True) -> list[tuple[Path, int]]:
        """Finish; returns the part files with their row counts. An empty table is one file with no rows."""
        if self._buffer or (not self.parts and keep_empty):
            self._flush()
        self._close_part()
        return self.parts


def read_rows(
    store: ObjectStore, files: Iterable[StoredFile], frames: tuple[int, int] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of table files, in order; with `frames`, only those whose `frame_index` lies in that closed range."""
    filters = None if frames is None else [("frame_index", ">=", frames[0]), ("frame_index", "<=", frames[1])]
    for stored in files:
        yield from pq.read_table(store.path(stored), filters=filters).to_pylist()
