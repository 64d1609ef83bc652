"""Artifacts that no ref and no snapshot reaches, and objects that no artifact lists: found, and removed."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from storage.artifacts import Artifact
from storage.catalog import Catalog
from storage.errors import CatalogError
from storage.objects import ObjectStore, StoredObject


@dataclass(frozen=True)
class Garbage:
    """What may go.

    Attributes:
        artifacts: That nothing reaches.
        objects: That only those artifacts list, or none.
        before: All of it is older than this.
    """

    artifacts: list[Artifact]
    objects: list[StoredObject]
    before: datetime

    @property
    def bytes(self) -> int:
        """What removing it frees."""
        return sum(entry.bytes for entry in self.objects)


def find_garbage(catalog: Catalog, store: ObjectStore, keep: timedelta) -> Garbage:
    """Find what nothing reaches and is older than `keep`. Nothing is removed.

    A ref and a snapshot reach their artifacts, and an artifact reaches what it was made from. Units of computations
    that have not ended reach their files.
    """
    artifacts = {artifact.id: artifact for artifact in catalog.artifacts()}
    reached: set[str] = set()
    queue = [name for name in catalog.reached() if name in artifacts]
    while queue:
        artifact_id = queue.pop()
        if artifact_id not in reached:
            reached.add(artifact_id)
            queue += [name for name in artifacts[artifact_id].inputs if name in artifacts]
    limit = datetime.now(UTC) - keep
    gone = [a for a in artifacts.values() if a.id not in reached and datetime.fromisoformat(a.created_at) < limit]
    kept = artifacts.keys() - {artifact.id for artifact in gone}
    needed = _listed(artifacts[name] for name in kept) | catalog.unit_keys()
    loose = [entry for entry in store.objects() if entry.key not in needed and entry.modified < limit]
    return Garbage(gone, loose, limit)


def remove_garbage(catalog: Catalog, store: ObjectStore, garbage: Garbage) -> int:
    """Remove it: artifacts first, so that none is ever listed without its bytes; then end uploads left unfinished.

    Returns:
        How many uploads were ended.

    Raises:
        CatalogError: A run is in progress: what it is about to commit may be an object that looks unused now.
    """
    refuse_active_runs(catalog)
    catalog.delete_artifacts(artifact.id for artifact in garbage.artifacts)
    store.delete(entry.key for entry in garbage.objects)
    return store.abort_uploads(garbage.before)


def refuse_active_runs(catalog: Catalog, besides: str | None = None) -> None:
    """Nothing is removed under a run that may be about to use it.

    Args:
        catalog: Which knows the runs.
        besides: The run that asks.

    Raises:
        CatalogError: A run is in progress.
    """
    active = [row for row in catalog.active_runs() if row["id"] != besides]
    if active:
        raise CatalogError(
            f"{len(active)} runs are in progress (such as {active[0]['command']}, since {active[0]['started_at']}): "
            "wait for their end; a run that was killed counts as in progress for two minutes"
        )


def find_loose_objects(catalog: Catalog, store: ObjectStore) -> list[StoredObject]:
    """Objects that no artifact and no unfinished computation lists."""
    known = listed_keys(catalog)
    return [entry for entry in store.objects() if entry.key not in known]


def listed_keys(catalog: Catalog, besides: Collection[str] = ()) -> set[str]:
    """Keys of the objects that artifacts, but for some, and unfinished computations list."""
    return _listed(a for a in catalog.artifacts() if a.id not in besides) | catalog.unit_keys()


def _listed(artifacts: Iterable[Artifact]) -> set[str]:
    return {f.key for artifact in artifacts for f in artifact.files}
