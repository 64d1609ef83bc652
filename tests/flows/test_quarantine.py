"""The quarantine: what it lists, how causes are told apart, and what another try means."""

import pytest

from flows.plan import choose_films, make_plan, select_stages
from flows.quarantine import cluster, find_cause, list_failures, release
from stages.errors import UsageError
from tests.flows.ingested import PROFILE, fail


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("/a b/film.mp4: the file is empty (0 bytes); copy it again", "the file is empty"),
        ("/x/2.mp4: 72.0 h is longer than 24 h; cut it", "... h is longer than ... h"),
        ("killed its worker 3 times: SIGSEGV", "killed its worker ... times: SIGSEGV"),
        ("keyframe 'a 1' of 0123456789abcdef cannot be read", "keyframe ... of ... cannot be read"),
    ],
)
def test_causes_leave_out_what_varies(error, cause):
    assert find_cause(error) == cause


def test_failures_of_one_cause_stand_together(workspace):
    for name in ("a", "b"):
        fail(workspace, name, f"/films/{name}.mp4: the file is empty (0 bytes); copy it again")
    fail(workspace, "c", "/films/c.mp4: no video stream (audio); give another")
    rows = cluster(list_failures(workspace))
    assert [(row["cause"], row["count"]) for row in rows] == [("the file is empty", 2), ("no video stream", 1)]
    failure = next(f for f in list_failures(workspace) if f.subject == "c")
    assert (failure.stage, failure.version, failure.source) == ("keyframes", 1, {"film_id": "c"})
    assert failure.first_seen == failure.last_seen


def test_releasing_a_cause_makes_its_films_due_again(workspace):
    fail(workspace, "a", "a.mp4: the file is empty")
    fail(workspace, "b", "b.mp4: no video stream")
    assert release(workspace, "EMPTY") == ["a"]
    films, chosen = choose_films(workspace, None)
    plan = make_plan(workspace, PROFILE, films, chosen, select_stages("keyframes"))
    assert {g.state: g.subjects for g in plan.groups} == {"missing": ["a"], "failed": ["b"]}
    with pytest.raises(UsageError, match="nothing in quarantine has the cause 'empty'"):
        release(workspace, "empty")
    assert release(workspace, None) == ["b"]
