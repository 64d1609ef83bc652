"""Backfills: which films, in which order, the failure budget, and a real batch in this process."""

import shutil

import pytest

from flows.backfill import BackfillRequest, check_budget, finish, judge_estimate, plan_backfill, run_batch
from flows.pipeline import Pipeline
from flows.sources import Source
from models import weights
from stages.errors import FailureBudgetError
from tests.flows.ingested import PROFILE, computing_pipeline, fail, ingest, note_film, profile_with

REAL = profile_with("engine.executor=inline", "keyframes.every_n_frames=30")


def batches(workspace, profile=PROFILE, **request):
    planned = plan_backfill(Pipeline(workspace, profile), BackfillRequest(**request)).batches
    return [[source.film_id for source in batch] for batch in planned]


def test_films_are_chosen_by_state_and_dealt_to_batches(workspace):
    ingest(workspace, "fresh", "old")
    ingest(workspace, "fresh", profile=profile_with("people.max_people=3"))
    for name in ("new 1", "new 2", "new 3"):
        note_film(workspace, name)
    fail(workspace, "broken", "no video stream")
    changed = profile_with("people.max_people=3")
    assert batches(workspace, changed, reprocess="missing", batch_films=2) == [["new 1", "new 2"], ["new 3"]]
    assert batches(workspace, changed, reprocess="stale") == [["old"]]
    assert batches(workspace, changed, reprocess="failed") == [["broken"]]
    assert sorted(film for batch in batches(workspace, changed) for film in batch) == [
        "broken",
        "new 1",
        "new 2",
        "new 3",
        "old",
    ]
    assert batches(workspace, changed, films="fresh") == []


def test_backwards_in_time(workspace):
    for name, year in (("b", 1999), ("a", 2020), ("c", None)):
        note_film(workspace, name, year=year)
    assert batches(workspace) == [["c", "b", "a"]]
    assert batches(workspace, backwards=True) == [["a", "b", "c"]]


def test_the_failure_budget():
    check_budget([{"films": 2, "newly_failed": 2}], 0.05)  # too few to tell
    check_budget([{"films": 100, "newly_failed": 5}], 0.05)
    check_budget([{"films": 4, "newly_failed": 4}], None)
    with pytest.raises(FailureBudgetError, match=r"6 of 100 films failed anew, more than the failure budget of 5%"):
        check_budget([{"films": 50, "newly_failed": 0}, {"films": 50, "newly_failed": 6}], 0.05)
    with pytest.raises(FailureBudgetError):
        check_budget([{"films": 9, "newly_failed": 3}], 0.0)


def test_a_batch_computes_the_selected_stages_and_resumes_with_the_rest(workspace, tmp_path):
    film = tmp_path / "a film.mp4"
    shutil.copy(weights.folder("demo_films") / "carphone_pristine.mp4", film)
    listed = tmp_path / "films.csv"
    listed.write_text(f"film_id,uri\nfirst,{film}\nmissing,{tmp_path}/nowhere.mp4\n")
    request = BackfillRequest(select="keyframes", films=str(listed))
    pipeline = computing_pipeline(workspace, REAL)
    (batch,) = plan_backfill(pipeline, request).batches
    assert run_batch(pipeline, request, batch) == {"films": 2, "failed": 1, "newly_failed": 1}
    assert "does not exist" in pipeline.failed["missing"][1]
    assert {a.kind for a in workspace.catalog.artifacts()} == {"keyframes"}
    assert finish(pipeline, request) is None

    rest = BackfillRequest(select="captions", films="first")
    later = computing_pipeline(workspace, REAL)
    first = [source for source in batch if source.film_id == "first"]
    run_batch(later, rest, first)
    assert {a.kind for a in workspace.catalog.artifacts()} == {"keyframes"}, "captions wait for people"
    assert [spec.stage for spec in later.reports] == []

    whole = computing_pipeline(workspace, REAL)
    everything = BackfillRequest()
    assert run_batch(whole, everything, first) == {"films": 1, "failed": 0, "newly_failed": 0}
    assert finish(whole, everything).startswith("snapshot-")
    assert "keyframes" not in {report.stage for report in whole.reports}
    again = plan_backfill(Pipeline(workspace, REAL), everything)
    assert again.batches == []


def test_a_failed_film_gets_another_try_and_its_attempts_add_up(workspace, tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"not a film")
    note_film(workspace, "bad", film)
    for _ in range(2):
        run_batch(computing_pipeline(workspace, REAL), BackfillRequest(reprocess="failed"), [Source("bad", str(film))])
    (failure,) = workspace.catalog.failures()
    assert failure["attempts"] == 2
    assert failure["result"]["first_seen"] < failure["updated_at"]
    again = run_batch(
        computing_pipeline(workspace, REAL), BackfillRequest(reprocess="stale"), [Source("bad", str(film))]
    )
    assert again == {"films": 1, "failed": 1, "newly_failed": 0}, "a known failure is left alone, and is no news"
    assert workspace.catalog.failures() == [failure]


def test_the_estimate_is_judged_afterwards(workspace):
    ingest(workspace, *"abcdef")
    note_film(workspace, "new")
    plan = plan_backfill(Pipeline(workspace, PROFILE), BackfillRequest()).plan
    total = plan.total()
    assert judge_estimate(plan, total.seconds)["within_range"] is True
    assert judge_estimate(plan, 1e6)["within_range"] is False
