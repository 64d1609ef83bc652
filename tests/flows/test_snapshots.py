"""Snapshots by name, and models by role."""

import pytest

from flows.ingest import pack_shards
from flows.model_registry import KINDS, champion, get_model, list_models, promote, register_model, roll_back
from flows.pipeline import Pipeline
from flows.snapshots import compare_snapshots, create_snapshot, find_snapshot, list_snapshots
from stages.errors import MissingInputError, UsageError
from storage.artifacts import Recipe
from tests.flows.ingested import PROFILE, commit, ingest


def pipeline_of(workspace):
    return Pipeline(workspace, PROFILE, lambda spec, works: pytest.fail("all is there already"), "run")


def grow(workspace, *films):
    """Ingest films and name the snapshot, as an ingestion does."""
    ingest(workspace, *films)
    return pack_shards(pipeline_of(workspace))


def test_a_name_keeps_its_snapshot_for_ever(workspace):
    with pytest.raises(MissingInputError, match="holds no films yet"):
        create_snapshot(workspace, "2026-11")
    first = grow(workspace, "a", "b")
    assert create_snapshot(workspace, "2026-11") == first == create_snapshot(workspace, "2026-11")
    second = grow(workspace, "c")
    assert second != first
    with pytest.raises(UsageError, match=f"'2026-11' stands for {first} already"):
        create_snapshot(workspace, "2026-11")
    assert [find_snapshot(workspace, name) for name in ("2026-11", "newest", first)] == [first, second, first]
    rows = list_snapshots(workspace)
    assert [(row["snapshot"], row["names"]) for row in rows] == [(first, ["2026-11"]), (second, ["newest"])]


@pytest.mark.parametrize("name", ["newest", "snapshot-1", " "])
def test_names_that_mean_something_else_are_refused(workspace, name):
    with pytest.raises(UsageError, match="choose another name"):
        create_snapshot(workspace, name)


def test_an_unknown_name_is_named(workspace):
    for name in ("nothing", "model-1"):
        with pytest.raises(UsageError, match=f"no snapshot '{name}'"):
            find_snapshot(workspace, name)


def test_what_tells_two_snapshots_apart(workspace):
    first = grow(workspace, "a", "b")
    second = grow(workspace, "c")
    found = compare_snapshots(workspace, first, "newest")
    assert (found["films_added"], found["films_removed"], found["films_gone"]) == (["c"], [], [0, 0])
    assert len(found["shards_added"]) + len(found["shards_changed"]) == 1
    back = compare_snapshots(workspace, second, first)
    assert (back["films_removed"], back["shards_removed"]) == (["c"], found["shards_added"])


def make_model(workspace, snapshot, seed):
    pipeline = pipeline_of(workspace)
    for kind in KINDS:
        pipeline.adopt(commit(workspace, kind, snapshot, Recipe(kind, 1, {"seed": seed}, {}, {}), []))
    return register_model(pipeline, snapshot)


def test_promotions_can_be_taken_back(workspace):
    snapshot = grow(workspace, "a")
    assert champion(workspace) is None
    with pytest.raises(MissingInputError, match="no model before the champion"):
        roll_back(workspace)
    first, second = (make_model(workspace, snapshot, seed) for seed in (1, 2))
    assert make_model(workspace, snapshot, 1).name == first.name
    promote(workspace, first.name)
    promote(workspace, second.name)
    assert champion(workspace).parts == second.parts
    assert [(row["name"], row["role"]) for row in list_models(workspace)] == [
        (first.name, "previous"),
        (second.name, "champion"),
    ]
    assert roll_back(workspace) == first.name
    assert roll_back(workspace) == second.name
    with pytest.raises(UsageError, match="is the champion already"):
        promote(workspace, second.name)


def test_a_model_that_is_not_there_is_named(workspace):
    with pytest.raises(UsageError, match="no model 'model-0'"):
        get_model(workspace, "model-0")
    snapshot = grow(workspace, "a")
    with pytest.raises(UsageError, match="no model"):
        promote(workspace, snapshot)
    made = make_model(workspace, snapshot, 1)
    workspace.catalog.delete_artifacts([made.parts["renderer"].id])
    with pytest.raises(UsageError, match="parts of model .* were removed"):
        promote(workspace, made.name)


def test_an_incomplete_training_is_no_model(workspace):
    assert register_model(pipeline_of(workspace), "snapshot-1") is None
