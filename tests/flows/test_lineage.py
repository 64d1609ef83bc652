"""Why an artifact is the way it is, and what differs between two."""

import pytest

from flows.lineage import compare_artifacts, explain_artifact
from stages.errors import UsageError
from tests.flows.ingested import ingest, profile_with


@pytest.fixture(autouse=True)
def _ingested(workspace):
    ingest(workspace, "a film")


def test_why_goes_down_to_the_film_and_names_each_artifact_once(workspace):
    shard = next(a for a in workspace.catalog.artifacts() if a.kind == "shards")
    rows = explain_artifact(workspace, shard.id)
    kinds = [row["kind"] for row in rows]
    assert sorted(kinds) == ["captions", "faces", "identities", "keyframes", "people", "scripts", "shards"]
    assert (rows[0]["depth"], rows[0]["id"]) == (0, shard.id)
    keyframes = next(row for row in rows if row["kind"] == "keyframes")
    assert keyframes["source"]["uri"].endswith("a film (gone)")
    assert keyframes["config"]["every_n_frames"] == 30
    captions = next(row for row in rows if row["kind"] == "captions")
    assert len(captions["inputs"]) == 4


def test_a_run_is_named(workspace):
    run_id = workspace.catalog.start_run("ingest")
    made = workspace.catalog.artifacts()[0]
    workspace.catalog.delete_artifacts([made.id])
    workspace.catalog.commit(made, run_id)
    assert explain_artifact(workspace, made.id)[0]["run"]["command"] == "ingest"


def test_diff_names_settings_and_files(workspace):
    first = workspace.catalog.current("people", "a film")
    ingest(workspace, "a film", profile=profile_with("people.max_people=3"))
    second = workspace.catalog.current("people", "a film")
    found = compare_artifacts(workspace, first.id, second.id)
    assert found["recipe"] == "people: config.max_people 5 -> 3"
    assert (found["same_recipe"], found["same_content"]) == (False, False)
    assert found["files_changed"] == ["part-00000.parquet"]
    assert compare_artifacts(workspace, first.id, first.id)["same_content"]


def test_an_unknown_artifact(workspace):
    with pytest.raises(UsageError, match="no artifact 'people-0'"):
        explain_artifact(workspace, "people-0")
