"""Snapshots by name: which shards, and through them which films, a training may see."""

from typing import Any

from flows.ingest import NEWEST_SNAPSHOT
from flows.workspace import Workspace
from stages.errors import MissingInputError, UsageError

NAMES = "snapshot/"
CONTENT_PREFIX = "snapshot-"


def create_snapshot(workspace: Workspace, name: str) -> str:
    """Give the newest snapshot a name that stands for it for ever; returns the snapshot that it stands for.

    Raises:
        UsageError: The name stands for another snapshot, or cannot be one.
        MissingInputError: Nothing was ingested yet.
    """
    catalog = workspace.catalog
    if f"{NAMES}{name}" == NEWEST_SNAPSHOT or name.startswith(CONTENT_PREFIX) or not name.strip():
        raise UsageError(f"a snapshot cannot be called {name!r}: choose another name, such as 2026-11")
    newest = catalog.get_ref(NEWEST_SNAPSHOT)
    if newest is None:
        raise MissingInputError(f"workspace {workspace.folder} holds no films yet: run `moviedreamer ingest FILM...`")
    known = catalog.get_ref(f"{NAMES}{name}")
    if known not in (None, newest):
        raise UsageError(f"snapshot '{name}' stands for {known} already: choose another name")
    catalog.set_ref(f"{NAMES}{name}", newest)
    return newest


def find_snapshot(workspace: Workspace, name: str) -> str:
    """The snapshot that a name stands for; `newest` is the one of the last ingestion.

    Raises:
        UsageError: There is none.
    """
    target = workspace.catalog.get_ref(f"{NAMES}{name}") or name
    if not target.startswith(CONTENT_PREFIX) or workspace.catalog.snapshot(target) is None:
        raise UsageError(f"no snapshot '{name}': `moviedreamer snapshot list` names them")
    return target


def list_snapshots(workspace: Workspace) -> list[dict[str, Any]]:
    """Every snapshot, oldest first: `snapshot, names, shards, films, created_at`."""
    catalog = workspace.catalog
    names: dict[str, list[str]] = {}
    for name, target in catalog.refs(NAMES).items():
        names.setdefault(target, []).append(name)
    return [
        {
            "snapshot": row["name"],
            "names": names.get(row["name"], []),
            "shards": len(row["artifact_ids"]),
            "films": sum(a.summary.get("films", 0) for i in row["artifact_ids"] if (a := catalog.artifact(i))),
            "created_at": row["created_at"],
        }
        for row in catalog.snapshots()
        if row["name"].startswith(CONTENT_PREFIX)
    ]


def compare_snapshots(workspace: Workspace, first: str, second: str) -> dict[str, Any]:
    """What tells two snapshots apart: shards by name, films by id.

    Films that were removed from the workspace since are counted, not named.
    """
    catalog = workspace.catalog
    shards, films, gone = [], [], []
    for name in (first, second):
        ids = catalog.snapshot(find_snapshot(workspace, name)) or []
        found = [artifact for i in ids if (artifact := catalog.artifact(i))]
        shards.append({artifact.subject: artifact.digest for artifact in found})
        known = catalog.subjects_of([i for artifact in found for i in artifact.inputs], "keyframes")
        films.append(set(known))
        gone.append(sum(artifact.summary.get("films", 0) for artifact in found) - len(known))
    before, after = shards
    return {
        "shards_added": sorted(after.keys() - before.keys()),
        "shards_removed": sorted(before.keys() - after.keys()),
        "shards_changed": sorted(s for s in before.keys() & after.keys() if before[s] != after[s]),
        "shards_same": sum(before[s] == after[s] for s in before.keys() & after.keys()),
        "films_added": sorted(films[1] - films[0]),
        "films_removed": sorted(films[0] - films[1]),
        "films_gone": gone,
    }
