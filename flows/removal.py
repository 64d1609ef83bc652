"""Takes one film out: its shards are rebuilt without it, and what only it owned is deleted."""

from dataclasses import asdict, dataclass
from typing import Any

from flows.ingest import FILM_STAGES, NEWEST_SNAPSHOT, pack_shards
from flows.model_registry import KINDS
from flows.pipeline import Pipeline
from flows.snapshots import CONTENT_PREFIX
from flows.workspace import Workspace
from stages import features, shards
from stages.errors import UsageError
from storage.catalog import current_ref
from storage.garbage import listed_keys, refuse_active_runs

OWN_KINDS = tuple(spec.output for spec in FILM_STAGES)


@dataclass(frozen=True)
class Removal:
    """What removing a film means.

    Attributes:
        film_id: The film.
        shards: Current shards that hold it, which are rebuilt.
        snapshots: That hold it; they stay as they are, and with them the shards that they list.
        models: Trained artifacts that saw it; they stay too.
        artifacts: That go.
        bytes: Of files that no other artifact lists, which go.
    """

    film_id: str
    shards: list[str]
    snapshots: list[str]
    models: list[str]
    artifacts: list[str]
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def plan_removal(workspace: Workspace, film_id: str) -> Removal:
    """Find what a film's removal touches. Nothing is written.

    Raises:
        UsageError: The workspace holds nothing of such a film.
    """
    catalog = workspace.catalog
    own = [a for kind in OWN_KINDS for a in catalog.artifacts_of(kind, film_id)]
    if catalog.film(film_id) is None and not own:
        raise UsageError(f"no film '{film_id}' in {workspace.folder}: expected the id of an ingested film")
    ids = {artifact.id for artifact in own}
    packed = [a for i in catalog.made_from(ids) if (a := catalog.artifact(i)) and a.kind == shards.SPEC.output]
    holding = {artifact.id for artifact in packed}
    current = {a.subject for a in packed if (now := catalog.current(a.kind, a.subject)) and now.id == a.id}
    snapshots = [row["name"] for row in catalog.snapshots() if holding & set(row["artifact_ids"])]
    seen, queue = set(holding), list(holding)
    while queue:
        queue = [i for i in catalog.made_from(queue) if i not in seen]
        seen.update(queue)
    models = [a.id for i in sorted(seen - holding) if (a := catalog.artifact(i)) and a.kind in KINDS]
    shared = listed_keys(catalog, besides=ids)
    size = sum({f.key: f.bytes for a in own for f in a.files if f.key not in shared}.values())
    names = [name for name in snapshots if name.startswith(CONTENT_PREFIX)]
    return Removal(film_id, sorted(current), names, models, sorted(ids), size)


def remove_film(pipeline: Pipeline, film_id: str) -> Removal:
    """Remove a film. Stopped in between, the same call goes on from there.

    Raises:
        UsageError: There is no such film.
        CatalogError: Another run is in progress, which may be about to use the film.
    """
    workspace, catalog = pipeline.workspace, pipeline.workspace.catalog
    removal = plan_removal(workspace, film_id)
    refuse_active_runs(catalog, besides=pipeline.run_id)
    catalog.forget_film(film_id)
    pack_shards(pipeline)
    for name in removal.shards:
        catalog.delete_ref(current_ref(features.SPEC.output, name))  # made with the film; training makes them anew
        if pipeline.get(shards.SPEC.output, name) is None and name not in pipeline.failed:
            catalog.delete_ref(current_ref(shards.SPEC.output, name))  # its last film is gone
    if not catalog.films():
        catalog.delete_ref(NEWEST_SNAPSHOT)
    keys = {f.key for i in removal.artifacts if (a := catalog.artifact(i)) for f in a.files}
    catalog.forget_subject(film_id, removal.artifacts)
    workspace.store.delete(sorted(keys - listed_keys(catalog)))
    return removal
