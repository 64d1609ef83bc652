"""What failed and is left alone until its stage, its settings or its inputs change, or someone asks for another try."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from flows.workspace import Workspace
from stages.errors import UsageError
from storage.artifacts import Artifact, read_rows
from storage.objects import StoredFile

_VARIABLE = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S+|\b[0-9a-f]{12,}\b|\d+(\.\d+)?""")


@dataclass(frozen=True)
class Failure:
    """A film or an item that failed.

    Attributes:
        stage: Where.
        subject: The film or shard.
        item: The keyframe, where one item failed and the film went on without it; None for the whole subject.
        cause: The error without the names, paths and numbers in it, so that failures of one kind share it.
        error: The error.
        attempts: Tries, workers that died over it included.
        first_seen, last_seen: UTC, ISO 8601.
        version: Of the stage.
        fingerprint: Of the recipe.
        inputs: The unit's input files: role to files, each with the key under which the store keeps it.
        source: For a stage that reads films: what it was to read.
        unit: The unit's index; `moviedreamer stage replay STAGE/SUBJECT#INDEX` runs it again.
    """

    stage: str
    subject: str
    item: str | None
    cause: str
    error: str
    attempts: int
    first_seen: str
    last_seen: str
    version: int
    fingerprint: str
    inputs: dict[str, list[dict[str, Any]]]
    source: dict[str, Any] | None = None
    unit: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def find_cause(error: str) -> str:
    """What kind of error it is: its first clause, with what varies from film to film taken out."""
    path, colon, rest = error.partition(": ")
    text = _VARIABLE.sub("...", rest if colon and "/" in path else error)
    return re.split(r"[;(]", text, maxsplit=1)[0].strip()[:120]


def list_failures(workspace: Workspace) -> list[Failure]:
    """Everything in quarantine, newest first: subjects that have no result, then items that results go without."""
    return [*_failed_subjects(workspace), *_failed_items(workspace)]


def _failed_subjects(workspace: Workspace) -> Iterable[Failure]:
    for row in workspace.catalog.failures():
        result = row["result"]
        yield Failure(
            row["stage"], row["subject"], None, find_cause(result["error"]), result["error"], row["attempts"],
            result["first_seen"], row["updated_at"], result["version"], row["fingerprint"],
            {role: [f | {"key": StoredFile(**f).key} for f in files] for role, files in result["inputs"].items()},
            result["source"], row["unit_index"],
        )  # fmt: skip


def _failed_items(workspace: Workspace) -> Iterable[Failure]:
    for artifact in reversed(workspace.catalog.artifacts_with_failed_items()):
        current = workspace.catalog.current(artifact.kind, artifact.subject)
        if current is None or current.id != artifact.id:
            continue
        rejects = [f for f in artifact.files if f.name.startswith("rejects-")]
        for row in read_rows(workspace.store, rejects):
            if row["outcome"] != "skip":
                yield _failed_item(artifact, row["item"], row["reason"])


def _failed_item(artifact: Artifact, item: str, error: str) -> Failure:
    recipe, at = artifact.recipe, artifact.created_at
    return Failure(
        recipe["stage"], artifact.subject, item, find_cause(error), error, 1, at, at, recipe["version"],
        artifact.fingerprint, {},
    )  # fmt: skip


def cluster(failures: Iterable[Failure]) -> list[dict[str, Any]]:
    """Failures of one stage and cause together, the most frequent first."""
    groups: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.stage, failure.cause), []).append(failure)
    rows = [
        {
            "stage": stage,
            "cause": cause,
            "count": len(found),
            "attempts": sum(f.attempts for f in found),
            "first_seen": min(f.first_seen for f in found),
            "last_seen": max(f.last_seen for f in found),
            "example": found[0].subject,
        }
        for (stage, cause), found in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row["count"], row["stage"], row["cause"]))


def release(workspace: Workspace, cause: str | None) -> list[str]:
    """Let failed subjects be tried again by the next ingestion or backfill; returns them.

    Args:
        workspace: Whose quarantine.
        cause: Part of a cause; None releases all.

    Raises:
        UsageError: No failure has such a cause.
    """
    found = [f for f in list_failures(workspace) if f.item is None and (cause or "").lower() in f.cause.lower()]
    if cause and not found:
        raise UsageError(f"nothing in quarantine has the cause {cause!r}: `moviedreamer quarantine list` names them")
    subjects = sorted({failure.subject for failure in found})
    workspace.catalog.forget_failures(subjects)
    return subjects
