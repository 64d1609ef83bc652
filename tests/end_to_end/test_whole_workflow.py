"""The command, as a user types it: films in, a movie out; again with nothing to do; with a change; interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest

from models import weights
from tests.servers import heed_interrupts

PROFILE = Path(__file__).with_name("tiny.yaml")
FILM_KINDS = ("keyframes", "people", "faces", "identities", "captions", "scripts")
MODEL_KINDS = ("features", "autoencoder", "tokens", "renderer", "autoregressive")
STORY_KINDS = ("story", "dream", "pictures", "movie", "evaluation")


def call(*arguments, cwd, code=0):
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-4000:] + done.stdout[-2000:]
    return done


def artifacts(folder):
    rows = json.loads(call("artifacts", "list", "--json", cwd=folder).stdout)
    return {(row["kind"], row["subject"]): row for row in rows}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a space in its name, two real films with odd names, and one file that is no film."""
    folder = tmp_path_factory.mktemp("a user's folder")
    films = folder / "my films"
    films.mkdir()
    demo = weights.folder("demo_films")
    shutil.copy(demo / "carphone_pristine.mp4", films / '-car "phone".mp4')
    shutil.copy(demo / "bikes.mp4", films / "bikes.mp4")
    (films / "broken.mp4").write_bytes(b"not a film at all")
    return folder


@pytest.fixture(scope="module")
def first_run(home):
    return call("run", "my films", "--profile", PROFILE, "--out", "out/movie.mp4", "--json", cwd=home, code=1)


def test_a_movie_comes_out_and_the_bad_film_is_named(home, first_run):
    summary = json.loads(first_run.stdout)
    assert [failure["subject"] for failure in summary["failed"]] == ["broken.mp4"]
    assert "broken.mp4" in summary["failed"][0]["error"]
    with av.open(str(home / "out" / "movie.mp4")) as movie:
        frames = sum(1 for _ in movie.decode(video=0))
        assert movie.streams.video[0].codec_context.name == "h264"
    assert frames > 24
    page = (home / "out" / "report.html").read_text()
    assert "<video" in page
    assert "broken.mp4" in page


def test_every_step_is_an_artifact(home, first_run):
    found = artifacts(home)
    kinds = {kind for kind, _ in found}
    assert kinds == {*FILM_KINDS, "shards", *MODEL_KINDS, *STORY_KINDS}
    for film in ('-car "phone".mp4', "bikes.mp4"):
        assert {kind for kind, subject in found if subject == film} == set(FILM_KINDS)
    assert not [subject for _, subject in found if subject == "broken.mp4"]
    fields = "id kind subject fingerprint digest stage stage_version rows bytes files inputs created_at seconds"
    assert all(list(row) == fields.split() for row in found.values())
    assert call("artifacts", "verify", cwd=home).stdout.endswith("0 problems\n")


def test_nothing_changed_means_nothing_done(home, first_run):
    before = artifacts(home)
    again = call("run", "my films", "--profile", PROFILE, "--out", "out/movie.mp4", cwd=home, code=1)
    assert "nothing to do" in again.stdout
    assert "keyframes of" not in again.stderr
    assert artifacts(home) == before


def test_models_are_compared_promoted_and_rolled_back(home, first_run):
    def models():
        return json.loads(call("models", "list", "--json", cwd=home).stdout)

    first = json.loads(call("retrain", "--profile", PROFILE, "--json", cwd=home).stdout)
    assert (first["computed"], first["decision"]["promoted"]) == ({}, True)
    again = call("retrain", "--profile", PROFILE, "--set", "train_autoregressive.seed=7", "--json", cwd=home)
    summary = json.loads(again.stdout)
    assert summary["computed"] == {"train_autoregressive": 1, "score": 2}
    scores, candidate = summary["decision"]["scores"], summary["decision"]["candidate"]
    assert set(scores) == {first["decision"]["candidate"], candidate}
    better = scores[candidate] > scores[first["decision"]["candidate"]]
    assert summary["decision"]["promoted"] == better
    if not better:
        call("models", "promote", candidate, cwd=home)
    assert {row["name"]: row["role"] for row in models()}[candidate] == "champion"
    assert all(row["score"] == pytest.approx(scores[row["name"]]) for row in models())
    call("models", "rollback", cwd=home)
    assert {row["role"]: row["name"] for row in models()} == {
        "champion": first["decision"]["candidate"],
        "previous": candidate,
    }
    assert (
        "is the champion already" in call("models", "promote", first["decision"]["candidate"], cwd=home, code=2).stderr
    )


def test_a_changed_caption_setting_redoes_captions_and_what_follows(home, first_run):
    before = artifacts(home)
    arguments = ("ingest", "my films", "--profile", PROFILE, "--set", "captions.max_sentences=3", "--json")
    summary = json.loads(call(*arguments, cwd=home, code=1).stdout)
    assert summary["computed"] == {"captions": 2, "scripts": 2, "shards": 1}
    again = json.loads(call("ingest", "my films", "--profile", PROFILE, "--json", cwd=home, code=1).stdout)
    assert again["computed"] == {}
    assert set(before) <= set(artifacts(home))


def test_an_operator_plans_backfills_and_looks_at_what_failed(home, first_run):
    settings = ("--profile", PROFILE, "--set", "captions.max_sentences=5")
    plan = json.loads(call("plan", *settings, "--select", "captions+", "--json", cwd=home).stdout)
    assert {row["stage"]: row["fresh"] for row in plan["stages"]} == {"captions": 0, "scripts": 0, "shards": 0}
    assert "captions: config.max_sentences 12 -> 5" in {group["reason"] for group in plan["groups"]}
    dry = call("backfill", *settings, "--dry-run", cwd=home).stdout
    assert "2 stale: captions: config.max_sentences 12 -> 5" in dry
    summary = json.loads(call("backfill", *settings, "--reprocess", "stale", "--json", cwd=home).stdout)
    assert summary["computed"] == {"captions": 2, "scripts": 2, "shards": 1}
    assert summary["batches"] == [{"films": 2, "failed": 0, "newly_failed": 0}]
    assert summary["estimate"]["seconds"] > 0
    assert call("backfill", *settings, "--reprocess", "missing", cwd=home).stdout.startswith("nothing to do")
    (failure,) = json.loads(call("quarantine", "list", "--json", cwd=home).stdout)
    assert (failure["subject"], failure["stage"]) == ("broken.mp4", "keyframes")
    assert "broken.mp4" in call("quarantine", "show", "broken.mp4", cwd=home).stdout
    state = json.loads(call("status", *settings, "--json", cwd=home).stdout)
    assert (state["running"], state["films"], state["failed"][0]["count"]) == ([], 3, 1)
    assert state["recent"][0]["command"] == "backfill"
    assert "1 released" in call("quarantine", "retry", cwd=home).stdout
    shard = next(row for (kind, _), row in artifacts(home).items() if kind == "shards")
    assert "bikes.mp4" in call("artifacts", "why", shard["id"], cwd=home).stdout
    assert "content: the same" in call("artifacts", "diff", shard["id"], shard["id"], cwd=home).stdout
    assert "would go" in call("artifacts", "gc", "--dry-run", "--keep", "0", cwd=home).stdout


def test_weights_and_numbers_can_be_read_by_machines(home, first_run):
    done = call("evaluate", "--profile", PROFILE, "--json", cwd=home)
    assert "to do:" not in done.stderr, "the champion was evaluated already"
    rows = json.loads(done.stdout)
    assert {"name", "value", "unit", "definition", "computed_with", "better"} <= set(rows[0])
    assert any(row["name"].startswith("reconstruction retrieval") and row["value"] is not None for row in rows)


def test_stories_become_movies(home, first_run):
    frame = {"scene_elements": ["This is a long shot."], "plot": ["The picture starts a new shot."]}
    story = {"title": "two frames", "characters": [], "frames": [frame | {"shot": 0}, frame | {"shot": 1}]}
    (home / "a story.json").write_text(json.dumps(story))
    (home / "another.json").write_text(json.dumps(story | {"frames": [frame] * 3}))
    (home / "broken.json").write_text("{")
    stories = ("a story.json", "broken.json", "another.json")
    done = call("generate", *stories, "--profile", PROFILE, "--out", "my movies", "--json", cwd=home, code=1)
    told = json.loads(done.stdout)
    assert told["movies"] == ["my movies/a-story.mp4", "my movies/another.mp4"]
    assert [(row["subject"], row["stage"]) for row in told["failed"]] == [("broken", "story")]
    assert (told["computed"]["dream"], told["computed"]["evaluate"]) == (2, 2)
    for movie in told["movies"]:
        assert (home / movie).stat().st_size > 1000
    call("generate", "a story.json", "--profile", PROFILE, "--out", "story.mp4", cwd=home)
    assert (home / "story.mp4").read_bytes() == (home / "my movies" / "a-story.mp4").read_bytes()


def test_interrupt_leaves_a_state_from_which_the_next_call_goes_on(home, tmp_path):
    command = [sys.executable, "-m", "flows.cli", "ingest", str(home / "my films"), "--profile", str(PROFILE)]
    own_group = {"start_new_session": True, "preexec_fn": heed_interrupts}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, **own_group) as started:
        deadline = time.monotonic() + 240
        for line in started.stderr:
            if "stages.engine: keyframes:" in line or time.monotonic() > deadline:
                break
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
        rest = started.stderr.read()
    assert started.returncode == 130, rest[-3000:]
    assert "run the same command again" in rest
    assert {kind for kind, _ in artifacts(tmp_path)} <= {"keyframes", "people"}
    done = call("ingest", home / "my films", "--profile", PROFILE, "--json", cwd=tmp_path, code=1)
    assert "keyframes" not in json.loads(done.stdout)["computed"]
    assert ("scripts", "bikes.mp4") in artifacts(tmp_path)
