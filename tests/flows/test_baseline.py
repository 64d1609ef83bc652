"""Other systems on the same story: their pictures, movie and numbers stand beside one's own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import pytest
from PIL import Image

from flows.cli import _stages_of
from flows.commands import Request, evaluation_rows, walk
from flows.generate import NEWEST_STORY
from flows.pipeline import Pipeline
from flows.profile import ExplainedProfile
from flows.workspace import Workspace
from stages.baseline import USUAL
from stages.errors import StoryError, UsageError
from tests.flows.ingested import commit, computing_pipeline, profile_with
from tests.flows.test_cli import call
from tests.tiny_pipelines import write_sdxl_pipeline, write_svd_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

STORY = {
    "characters": [{"identity": "Anna", "description": ["a girl in red"]}],
    "frames": [{"characters": [{"identity": "Anna"}], "plot": [plot]} for plot in ("she runs", "she sleeps")],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a story and the weights of two systems."""
    folder = tmp_path_factory.mktemp("a user's folder")
    (folder / "my story.json").write_text(json.dumps(STORY))
    write_sdxl_pipeline(folder / "sdxl")
    write_svd_pipeline(folder / "svd")
    return folder


def settings(home):
    small = (
        "sampling_steps=1",
        "precision=float32",
        "width_px=32",
        "height_px=32",
        "seconds_per_keyframe=0.5",
        f"svd={home / 'svd'}",
    )
    chosen = [f"baseline.{setting}" for setting in (*small, f"sdxl={home / 'sdxl'}")]
    return ["engine.executor=inline", "animate.seconds_per_keyframe=0.1", "evaluate.height_px=14",
            "evaluate.width_px=14", *chosen]  # fmt: skip


def test_two_systems_stand_beside_each_other_without_any_trained_model(home, workspace):
    request = Request("baseline", story=home / "my story.json")
    for method in ("frame_by_frame", "consistent_attention"):
        profile = profile_with(*settings(home), f"baseline.method={method}")
        plan = Pipeline(workspace, profile)
        walk(plan, request)
        assert [(todo.stage, todo.subject) for todo in plan.todo] == [("baseline", f"{method}.my-story")]
        walked = walk(computing_pipeline(workspace, profile), request)
        assert (walked.pipeline.failed, walked.movie is None) == ({}, False)
        again = Pipeline(workspace, profile)
        walk(again, request)
        assert (again.todo, again.fresh) == ([], 3)
    catalog = workspace.catalog
    made = [catalog.current("pictures", f"{m}.my-story") for m in ("frame_by_frame", "consistent_attention")]
    assert made[0].digest != made[1].digest
    assert [stored.name for stored in made[0].files] == ["pictures.parquet", "prompts.json"]
    numbers = evaluation_rows(workspace, "consistent_attention")
    assert any(number["value"] is not None for number in numbers), "without films and models, pictures alone give any"
    assert catalog.get_ref(NEWEST_STORY) is None, "what `evaluate` and the report speak of is one's own"


def test_a_dream_of_the_same_story_tells_whose_faces_to_look_for(home, workspace):
    profile = profile_with(*settings(home), "baseline.method=frame_by_frame")
    request = Request("baseline", story=home / "my story.json")
    walk(computing_pipeline(workspace, profile), request)
    story = workspace.catalog.current("story", "my-story")
    recipe = replace(Pipeline(workspace, profile).work(*_dream_of(story)).recipe)
    commit(workspace, "dream", "my-story", replace(recipe, inputs={"story": ["another's digest"]}), [])
    other, own = Pipeline(workspace, profile), Pipeline(workspace, profile)
    walk(other, request)
    commit(workspace, "dream", "my-story", replace(recipe, version=99), [story.id])
    walk(own, request)
    assert ([todo.stage for todo in other.todo], [todo.stage for todo in own.todo]) == ([], ["evaluate"])


def _dream_of(story):
    from stages import dream

    return dream.SPEC, story.subject, {"story": [story]}


def test_what_is_asked_wrongly_is_refused(home, workspace):
    def ask(method, **asked):
        walk(
            Pipeline(workspace, profile_with(*settings(home), f"baseline.method={method}")),
            Request("baseline", **asked),
        )

    with pytest.raises(UsageError, match="only svd_chain starts from a picture, and freenoise does not"):
        ask("freenoise", story=home / "my story.json", first=home / "x.png")
    with pytest.raises(UsageError, match=r"x.png does not exist: correct the path"):
        ask("svd_chain", story=home / "my story.json", first=home / "x.png")
    with pytest.raises(StoryError, match=r"my story.json: cannot be read as a picture .* give a JPEG or PNG"):
        ask("svd_chain", story=home / "my story.json", first=home / "my story.json")
    with pytest.raises(UsageError, match="baseline.method is null: name a system"):
        ask("null", story=home / "my story.json")
    with pytest.raises(UsageError, match="a baseline needs a story"):
        ask("freenoise")


def test_other_systems_weights_are_asked_for_by_their_command_alone(monkeypatch, capsys, tmp_path, home):
    story = home / "my story.json"
    code, _, err = call(monkeypatch, capsys, "baseline", "freenoise", "--story", story, "--workspace", tmp_path / "w",
                        "--set", f"engine.weights_dir={tmp_path}")  # fmt: skip
    assert code == 1
    assert "animatediff_v15_2" in err and "sd15" in err and "sdxl" not in err
    chosen = ExplainedProfile("embedded", ("baseline.method=freenoise",)).profile
    for command in ("run", "ingest", "train", "generate", "evaluate"):
        assert not {"sd15", "animatediff_v15_2"} & set(chosen.weights(_stages_of(command)))
    assert "sd15" not in ExplainedProfile("paper").profile.weights()


def test_the_command_tells_a_failure_in_one_object_and_its_own_method_wins(home, monkeypatch, capsys):
    story = home / "two frames.json"
    story.write_text(json.dumps({"frames": [{"plot": ["she runs"]}] * 2}))
    empty = home / "empty"
    empty.mkdir()
    changed = [*settings(home)[:-1], f"baseline.sdxl={empty}", "baseline.method=freenoise"]
    options = [word for setting in changed for word in ("--set", setting)]
    code, out, _ = call(monkeypatch, capsys, "baseline", "frame_by_frame", "--json", "--tables", "--story", story,
                          "--workspace", home / "failing", *options)  # fmt: skip
    told = json.loads(out)
    assert (code, told["movie"], told["numbers"]) == (1, None, [])
    assert [table["table"] for table in told["tables"]] == [1, 2]
    (failed,) = told["failed"]
    assert (failed["subject"], failed["stage"]) == ("frame_by_frame.two-frames", "baseline")
    assert "no SDXL pipeline at" in failed["error"]


def test_a_system_that_is_none_is_refused_with_those_there_are(monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, "baseline", "dreaming", "--story", "s.json", "--workspace", tmp_path)
    assert code == 2
    for method in USUAL:
        assert repr(method) in err


def test_the_command_makes_a_movie_and_prints_numbers(home):
    Image.new("RGB", (64, 48), "red").save(home / "first.png")
    options = [word for setting in settings(home)[:-1] for word in ("--set", setting)]
    named = {"story": "my story.json", "first": "first.png", "out": "out/svd.mp4", "workspace": "workspace"}
    places = [word for name, place in named.items() for word in (f"--{name}", str(home / place))]
    command = [sys.executable, "-m", "flows.cli", "baseline", "svd_chain", "--json", *places, *options]
    ran = {"cwd": Path(__file__).parents[2], "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    done = [subprocess.run(command, **ran, capture_output=True, text=True, timeout=300) for _ in range(2)]
    assert [run.returncode for run in done] == [0, 0], done[0].stderr[-3000:]
    told = json.loads(done[0].stdout)
    assert set(told) == {"movie", "numbers", "failed"}
    assert (told["movie"], told["failed"]) == (str(home / "out" / "svd.mp4"), [])
    assert any(number["value"] is not None for number in told["numbers"])
    assert json.loads(done[1].stdout) == json.loads(done[0].stdout)
    assert ("to do: baseline" in done[0].stderr, "to do:" in done[1].stderr) == (True, False)
    with av.open(str(home / "out" / "svd.mp4")) as movie:
        assert sum(1 for _ in movie.decode(video=0)) == 5  # two pictures of 0.1 s each, at 24 frames a second
    opened = Workspace.open(home / "workspace")
    assert opened.catalog.current("pictures", "svd_chain.my-story").summary["method"] == "svd_chain"
    opened.catalog.close()
