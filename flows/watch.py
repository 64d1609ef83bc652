"""Looks whether films appeared in a folder or under a bucket's prefix."""

import time
from pathlib import Path

from flows.sources import FILM_SUFFIXES, expand, is_bucket
from flows.workspace import Workspace
from stages.errors import UsageError
from storage.objects import list_bucket

EVENT = "moviedreamer.films-appeared"


def find_new_films(workspace: Workspace, place: str, settle_s: float) -> list[str]:
    """Films of a place that were never ingested, or changed since.

    Args:
        workspace: Whose catalog knows what was ingested.
        place: A folder, or a bucket's prefix (`s3://bucket/films/`).
        settle_s: A local file that was written more recently than this is still being copied, and is left for later.

    Returns:
        Their ids, sorted; none of them while an ingestion is in progress, which may be at work on them.

    Raises:
        UsageError: There is no such place.
    """
    if any(row["command"] in ("ingest", "run") for row in workspace.catalog.active_runs()):
        return []
    known = {row["film_id"]: row for row in workspace.catalog.films()}
    if is_bucket(place):
        sizes = {name: size for name, size in list_bucket(place) if Path(name).suffix.lower() in FILM_SUFFIXES}
        return sorted(name for name, size in sizes.items() if name not in known or known[name]["bytes"] != size)
    if not Path(place).is_dir():
        raise UsageError(f"no folder {place!r} to watch: expected a folder, or a bucket's prefix such as s3://b/films/")
    if not any(p.suffix.lower() in FILM_SUFFIXES for p in Path(place).rglob("*")):
        return []
    found = []
    for source in expand([place]):
        facts, row = Path(source.uri).stat(), known.get(source.film_id)
        same = row and (row["bytes"], row["modified_ns"]) == (facts.st_size, facts.st_mtime_ns)
        if not same and time.time() - facts.st_mtime >= settle_s:
            found.append(source.film_id)
    return found
