"""Plans over a catalog: states and their reasons, selections, and that nothing is written."""

import shutil

import pytest

from flows.ingest import FILM_STAGES, ingest_films
from flows.pipeline import Pipeline
from flows.plan import STAGES, choose_films, make_plan, select_stages
from flows.sources import Film
from flows.workspace import Workspace
from stages.errors import CatalogueError, UsageError
from tests.flows.ingested import PROFILE, fail, ingest, note_film, pack, profile_with


def plan(workspace, profile=PROFILE, select=None, films=None):
    return make_plan(workspace, profile, *choose_films(workspace, films), select_stages(select))


def states(found):
    return {(g.stage, g.state): g.reason for g in found.groups}


def test_everything_is_fresh_after_an_ingestion(workspace):
    ingest(workspace, "a", "b")
    found = plan(workspace)
    assert {group.state for group in found.groups} == {"fresh"}
    assert [count["fresh"] for count in found.counts().values()] == [2] * len(FILM_STAGES) + [
        len({*found.groups[-1].subjects})
    ]
    assert (found.total().seconds, found.total().bytes) == (0, 0)


def test_a_changed_setting_names_itself_and_blocks_what_follows(workspace):
    ingest(workspace, "a", "b")
    found = states(plan(workspace, profile_with("captions.max_sentences=8")))
    assert found["captions", "stale"] == "captions: config.max_sentences 12 -> 8"
    assert found["scripts", "blocked"] == "waits for captions"
    assert found["shards", "blocked"] == "waits for films"
    assert {stage for stage, state in found if state == "fresh"} == {"keyframes", "people", "faces", "identities"}


def test_a_plan_agrees_with_the_walk_of_an_ingestion(workspace):
    ingest(workspace, "a")
    digest = note_film(workspace, "b")
    settings = profile_with("people.max_people=3")
    walked = Pipeline(workspace, settings)
    films = [Film(row["film_id"], row["uri"], row["digest"]) for row in workspace.catalog.films()]
    ingest_films(walked, films)
    found = plan(workspace, settings)
    expected = {(todo.stage, todo.subject, todo.state, todo.reason) for todo in walked.todo}
    assert digest == films[1].digest
    assert expected == {
        (g.stage, subject, g.state, g.reason)
        for g in found.groups
        if g.state in ("missing", "stale")
        for subject in g.subjects
    }


def test_what_failed_is_not_due_and_its_shard_goes_without_it(workspace):
    ingest(workspace, "a")
    fail(workspace, "broken", "broken: no video stream; give another file")
    found = plan(workspace)
    assert states(found)["keyframes", "failed"].startswith("broken: no video stream")
    assert states(found)["people", "blocked"] == "keyframes failed"
    assert not any(group.due for group in found.groups)
    assert not [g for g in found.groups if g.stage == "shards" and g.state != "fresh"]


def test_a_file_that_changed_and_one_that_is_gone(workspace, tmp_path):
    film = tmp_path / "a film.mp4"
    film.write_bytes(b"x")
    ingest(workspace, "a film.mp4", "gone.mp4")
    note_film(workspace, "a film.mp4", film)
    assert {g.state for g in plan(workspace).groups} == {"fresh"}
    film.write_bytes(b"another")
    found = plan(workspace)
    assert states(found)["keyframes", "stale"] == "the file changed since it was ingested"
    assert next(g.subjects for g in found.groups if g.state == "stale") == ["a film.mp4"]


def test_films_by_pattern_and_by_catalogue(workspace, tmp_path):
    ingest(workspace, "a.mp4", "b.mkv")
    assert plan(workspace, films="*.mkv").counts()["keyframes"] == {"fresh": 1}
    listed = tmp_path / "films.csv"
    listed.write_text("film_id,uri\na.mp4,/a.mp4\nnew,/new.mp4\n")
    found = plan(workspace, films=str(listed))
    assert found.counts()["keyframes"] == {"fresh": 1, "missing": 1}
    assert states(found)["keyframes", "missing"] == "never ingested"
    with pytest.raises(UsageError, match=r"no film of the workspace matches 'c\*'"):
        plan(workspace, films="c*")
    listed.write_text("film_id\nx\n")
    with pytest.raises(CatalogueError, match="no column uri"):
        plan(workspace, films=str(listed))


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("people", ["people"]),
        ("captions+", ["captions", "scripts", "shards"]),
        ("+faces", ["keyframes", "people", "faces"]),
        (None, [spec.name for spec in STAGES]),
    ],
)
def test_selections(selection, expected):
    assert [spec.name for spec in select_stages(selection)] == expected


def test_an_unknown_stage_is_named_with_those_there_are():
    with pytest.raises(UsageError, match="no stage 'peple' to select: expected one of keyframes, people"):
        select_stages("peple+")


def test_estimates_come_from_what_was_computed(workspace):
    ingest(workspace, "a", seconds=3.0)
    ingest(workspace, "b", seconds=5.0)
    for index in range(10):
        note_film(workspace, f"new {index}")
    estimate = plan(workspace).estimates["keyframes"]
    one_film = plan(workspace, films="new 1").estimates["keyframes"]
    assert estimate.seconds == pytest.approx(10 * one_film.seconds)
    assert estimate.seconds_low < estimate.seconds < estimate.seconds_high
    assert estimate.bytes == 10_000


def test_without_history_there_is_no_estimate(workspace):
    note_film(workspace, "new")
    found = plan(workspace)
    assert found.estimates["keyframes"].seconds is None
    assert found.total().seconds is None


def test_a_plan_writes_nothing(workspace, tmp_path):
    ingest(workspace, "a")
    note_film(workspace, "b")
    shutil.copytree(workspace.folder, tmp_path / "copy")
    before = Workspace.open(tmp_path / "copy").catalog
    plan(workspace, profile_with("captions.max_sentences=8"))
    assert before.films() == workspace.catalog.films()
    assert before.artifacts() == workspace.catalog.artifacts()
    assert before.reached() == workspace.catalog.reached()
    before.close()


def test_a_held_out_film_makes_its_shard_stale(workspace):
    ingest(workspace, "a")
    note_film(workspace, "a", split="test")
    assert states(plan(workspace))["shards", "stale"] == "shards: config.heldout_films [] -> ['a']"
    pack(workspace)
    assert ("shards", "stale") not in states(plan(workspace))
