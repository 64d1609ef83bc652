"""Where a workspace keeps its things, and an ingestion with Postgres and a bucket, by workers of their own."""

import pytest

from flows.workspace import Workspace
from models import weights
from stages.errors import UsageError
from storage.garbage import find_loose_objects
from tests.flows.ingested import ingest_in_process, profile_with

FILM = weights.folder("demo_films") / "carphone_pristine.mp4"


def test_everything_lies_in_the_folder_by_default(tmp_path):
    opened = Workspace.open(tmp_path / "a w-orkspace")
    assert opened.store.uri == str(tmp_path / "a w-orkspace" / "objects")
    assert (tmp_path / "a w-orkspace" / "catalog.sqlite").is_file()
    opened.catalog.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objekts: x", "objekts: Extra inputs are not permitted"),
        ("catalog: postgresql://me:secret@db/x", "the URL holds a password: put it into ~/.pgpass"),
        ("catalog: [", "is not YAML"),
        ("- a\n", "expected `catalog: URL`"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, message):
    (tmp_path / "workspace.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        Workspace.open(tmp_path)
    assert "secret" not in str(caught.value)


def test_an_ingestion_with_a_shared_catalog_and_a_bucket(tmp_path, postgres, s3):
    place = postgres.new_database()
    bucket = f"s3://films/{place.rpartition('/')[2]}"
    (tmp_path / "workspace.yaml").write_text(f"catalog: postgresql+psycopg:{place}\nobjects: {bucket}\n")
    opened = Workspace.open(tmp_path)
    profile = profile_with("engine.executor=inline", "keyframes.every_n_frames=60")
    walked = ingest_in_process(opened, profile, [FILM])
    assert walked.failed == {}
    assert [artifact.rows for artifact in walked.all("keyframes")] == [2]
    assert find_loose_objects(opened.catalog, opened.store) == []
    for artifact in opened.catalog.artifacts():
        for stored in artifact.files:
            opened.store.verify(stored)
    assert not (tmp_path / "objects").exists()
    assert ingest_in_process(opened, profile, [FILM]).reports == []
    opened.catalog.close()
