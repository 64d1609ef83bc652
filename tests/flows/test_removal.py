"""Films come and go: every shard but their own stays byte for byte, and what only they owned goes with them."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows.ingest import pack_shards, shard_name
from flows.model_registry import KINDS
from flows.removal import plan_removal, remove_film
from flows.workspace import Workspace
from stages.errors import UsageError
from stages.shards import shard_of
from storage.artifacts import Recipe
from storage.errors import CatalogError
from storage.garbage import find_loose_objects
from tests.flows.ingested import commit, computing_pipeline, ingest_films, profile_with

COUNT = 64
PROFILE = profile_with("engine.executor=inline", f"shards.count={COUNT}")
FILMS = [f"film {number:03d} - part.mp4" for number in range(200)]
GONE = FILMS[70]


def small_tables(workspace, folder):
    """Two keyframes of 8x8 pixels for each film; scripts without a word; nobody in the pictures."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 60)).save(stream, "JPEG")
    script = json.dumps({"characters": [], "scene_elements": ["A wall."], "plot": []})

    def value(column, film_id, frame):
        known = {"film_id": film_id, "frame_index": frame, "jpeg": stream.getvalue(), "script": script}
        plain = {pa.string(): "", pa.binary(): b"", pa.bool_(): False}
        return known.get(column.name, [] if pa.types.is_list(column.type) else plain.get(column.type, 0))

    def table(spec, film_id):
        frames = (0, 30) if spec.output in ("keyframes", "scripts") else ()
        rows = [{column.name: value(column, film_id, frame) for column in spec.schema} for frame in frames]
        path = folder / "part-00000.parquet"
        pq.write_table(pa.Table.from_pylist(rows, spec.schema), path)
        return workspace.store.put(path, path.name, len(rows))

    return table


def pack(workspace):
    pipeline = computing_pipeline(workspace, PROFILE)
    pack_shards(pipeline)
    assert pipeline.failed == {}
    workspace.catalog.end_run(pipeline.run_id, "done", {})
    return {a.subject: a.digest for name in range(COUNT) if (a := current_shard(workspace, name))}


def current_shard(workspace, index):
    return workspace.catalog.current("shards", shard_name(index))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A workspace of 200 films, and the digests of its shards."""
    folder = tmp_path_factory.mktemp("films")
    workspace = Workspace.open(folder / "w")
    table = small_tables(workspace, folder)
    ingest_films(workspace, FILMS, PROFILE, table=table)
    yield workspace, pack(workspace), table
    workspace.catalog.close()


def test_one_of_200_films_comes_and_goes(packed):
    workspace, before, table = packed
    catalog, own = workspace.catalog, shard_name(shard_of(GONE, COUNT))
    snapshot = catalog.get_ref("snapshot/newest")
    seen = commit(workspace, KINDS[0], snapshot, Recipe(KINDS[0], 1, {}, {}, {}), [catalog.current("shards", own).id])
    planned = plan_removal(workspace, GONE)
    assert (planned.shards, planned.snapshots, planned.models) == ([own], [snapshot], [seen.id])
    keys = {f.key for i in planned.artifacts for f in catalog.artifact(i).files}

    pipeline = computing_pipeline(workspace, PROFILE)
    assert remove_film(pipeline, GONE) == planned
    catalog.end_run(pipeline.run_id, "done", {})
    assert [report.stage for report in pipeline.reports] == ["shards"]
    assert list(pipeline.reports[0].done) == [own]
    after = {a.subject: a.digest for index in range(COUNT) if (a := current_shard(workspace, index))}
    assert {name for name in before if before[name] != after.get(name)} == {own}
    assert catalog.film(GONE) is None
    assert not any(a.subject == GONE for a in catalog.artifacts())
    shared = {f.key for a in catalog.artifacts() for f in a.files}
    assert keys - shared and not (keys - shared) & set(workspace.store.keys())
    assert find_loose_objects(catalog, workspace.store) == []
    for artifact in catalog.artifacts():
        if artifact.kind != KINDS[0]:
            for stored in artifact.files:
                workspace.store.verify(stored)

    ingest_films(workspace, [GONE], PROFILE, table=table)
    assert pack(workspace) == before, "the film is back, and with it the very same bytes"
    assert catalog.get_ref("snapshot/newest") == snapshot


def test_the_last_film_of_a_shard_takes_the_shard_with_it(tmp_path):
    workspace = Workspace.open(tmp_path / "w")
    ingest_films(workspace, ["one", "two"], PROFILE, table=small_tables(workspace, tmp_path))
    pack(workspace)
    pipeline = computing_pipeline(workspace, PROFILE)
    remove_film(pipeline, "one")
    assert current_shard(workspace, shard_of("one", COUNT)) is None
    assert current_shard(workspace, shard_of("two", COUNT)) is not None
    remove_film(pipeline, "two")
    assert [a.kind for a in workspace.catalog.artifacts()] == ["shards", "shards"], "the old snapshot keeps them"
    assert workspace.catalog.get_ref("snapshot/newest") is None
    workspace.catalog.close()


def test_a_removal_that_was_stopped_goes_on(tmp_path):
    workspace = Workspace.open(tmp_path / "w")
    ingest_films(workspace, ["one", "two"], PROFILE, table=small_tables(workspace, tmp_path))
    pack(workspace)
    workspace.catalog.forget_film("one")
    remove_film(computing_pipeline(workspace, PROFILE), "one")
    assert not any(a.subject == "one" for a in workspace.catalog.artifacts())
    with pytest.raises(UsageError, match="no film 'one'"):
        plan_removal(workspace, "one")
    workspace.catalog.close()


def test_nothing_is_removed_under_another_run(tmp_path):
    workspace = Workspace.open(tmp_path / "w")
    ingest_films(workspace, ["one"], PROFILE, table=small_tables(workspace, tmp_path))
    workspace.catalog.start_run("ingest")
    with pytest.raises(CatalogError, match="1 runs are in progress"):
        remove_film(computing_pipeline(workspace, PROFILE), "one")
    assert workspace.catalog.film("one") is not None
    workspace.catalog.close()
