"""What may be removed, and what never is."""

from datetime import timedelta

import boto3
import pytest

from storage.artifacts import Artifact, Recipe, artifact_id, content_digest
from storage.catalog import Catalog
from storage.errors import CatalogError
from storage.garbage import find_garbage, find_loose_objects, remove_garbage
from storage.objects import ObjectStore

NOW = timedelta(0)


def put(store, tmp_path, content):
    path = tmp_path / "file"
    path.write_text(content)
    return store.put(path, "part-00000.parquet")


def commit(catalog, stored, kind="people", version=1, inputs=()):
    recipe = Recipe(kind, version, {}, {}, {})
    made = artifact_id(kind, "a film", recipe.fingerprint)
    return catalog.commit(
        Artifact(
            made, kind, "a film", recipe.fingerprint, content_digest((stored,)), {**recipe.__dict__}, (stored,), inputs
        )
    )


def test_what_a_ref_or_snapshot_reaches_stays_with_all_it_was_made_from(catalog, store, tmp_path):
    first = commit(catalog, put(store, tmp_path, "keyframes"), "keyframes")
    old = commit(catalog, put(store, tmp_path, "old"), version=1, inputs=(first.id,))
    named = commit(catalog, put(store, tmp_path, "named"), version=2, inputs=(first.id,))
    catalog.save_snapshot("s", [named.id])
    newest = commit(catalog, put(store, tmp_path, "new"), version=3, inputs=(first.id,))
    garbage = find_garbage(catalog, store, NOW)
    assert [a.id for a in garbage.artifacts] == [old.id]
    assert [entry.key for entry in garbage.objects] == [old.files[0].key]
    remove_garbage(catalog, store, garbage)
    assert {a.id for a in catalog.artifacts()} == {first.id, named.id, newest.id}
    assert old.files[0].key not in {entry.key for entry in store.objects()}
    assert len(store.keys()) == 3


def test_bytes_that_another_artifact_lists_stay(catalog, store, tmp_path):
    same = put(store, tmp_path, "same")
    commit(catalog, same, version=1)
    commit(catalog, same, version=2)
    garbage = find_garbage(catalog, store, NOW)
    assert (len(garbage.artifacts), garbage.objects, garbage.bytes) == (1, [], 0)


def test_young_and_unfinished_work_stays(catalog, store, tmp_path):
    loose = put(store, tmp_path, "left by a killed run")
    unfinished = put(store, tmp_path, "a unit's result")
    catalog.save_unit(("people", "b", "f", 0), "done", 1, {"files": [unfinished.as_dict()]})
    assert find_garbage(catalog, store, timedelta(days=1)).objects == []
    assert [entry.key for entry in find_garbage(catalog, store, NOW).objects] == [loose.key]
    assert [entry.key for entry in find_loose_objects(catalog, store)] == [loose.key]


def test_nothing_is_removed_while_a_run_is_in_progress(catalog, store, tmp_path):
    put(store, tmp_path, "loose")
    run_id = catalog.start_run("ingest")
    garbage = find_garbage(catalog, store, NOW)
    with pytest.raises(CatalogError, match="1 runs are in progress"):
        remove_garbage(catalog, store, garbage)
    catalog.end_run(run_id, "done", {})
    remove_garbage(catalog, store, garbage)
    assert store.keys() == []
    remove_garbage(catalog, store, garbage)


def test_uploads_that_were_never_finished_are_ended(s3, tmp_path):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    bucket = ObjectStore("s3://films/unfinished", tmp_path / "cache")
    client = boto3.client("s3")
    client.create_multipart_upload(Bucket="films", Key="unfinished/ab/abc.tar")
    client.create_multipart_upload(Bucket="films", Key="another prefix/ab/abc.tar")
    assert remove_garbage(catalog, bucket, find_garbage(catalog, bucket, timedelta(days=1))) == 0
    assert remove_garbage(catalog, bucket, find_garbage(catalog, bucket, timedelta(seconds=-5))) == 1
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket="films")["Uploads"]]
    assert left == ["another prefix/ab/abc.tar"]
    catalog.close()
