"""Another system's pictures of a story, scored by the evaluate stage itself."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows import cli
from flows.commands import Request, all_evaluations, evaluation_rows, walk
from flows.generate import register_pictures, register_story
from flows.pipeline import Pipeline
from flows.report import render_page
from flows.report_data import gather
from stages.errors import MissingInputError, UsageError
from stages.render import ROW_GROUP
from storage.artifacts import Recipe
from tests.flows.ingested import commit, computing_pipeline, ingest, profile_with
from tests.flows.test_cli import call

FRAMES = [
    {"characters": [{"identity": "Ann"}], "plot": ["Ann waits."], "shot": 0},
    {"characters": [{"identity": "Ann"}], "plot": ["Ann leaves."]},
    {"plot": ["The street is empty."], "shot": 1},
]
PROFILE = profile_with("engine.executor=inline", "evaluate.height_px=70", "evaluate.width_px=84")


@pytest.fixture
def story(tmp_path):
    told = {"characters": [{"identity": "Ann", "description": ["Ann is tall."]}], "frames": FRAMES}
    path = tmp_path / "heist.json"
    path.write_text(json.dumps(told))
    return path


@pytest.fixture
def pictures(tmp_path):
    """Two pictures alike but for a line, and a third that is not."""
    folder = tmp_path / "of seine"
    folder.mkdir()
    rng = np.random.default_rng(0)
    first, last = (rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(2))
    second = first.copy()
    second[0] = 0
    for number, picture in enumerate((first, second, last), 9):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


def scored(workspace, story, pictures, name="seine"):
    pipeline = computing_pipeline(workspace, PROFILE)
    walk(pipeline, Request("score_pictures", story=story, pictures=pictures, name=name))
    return pipeline


def test_another_systems_pictures_get_the_numbers_of_ours(workspace, story, pictures):
    pipeline = scored(workspace, story, pictures)
    assert [report.stage for report in pipeline.reports] == ["evaluate"] and not pipeline.failed
    numbers = {number["name"]: number for number in evaluation_rows(workspace, "seine")}
    assert numbers["ST (DINOv2)"]["computed_with"].endswith("1 pairs of frames"), "Ann is in the first two"
    assert numbers["ST (DINOv2)"]["value"] > numbers["DINO-sim"]["value"] + 0.002
    assert numbers["CLIP score"]["computed_with"] == "not available in this profile: needs CLIP weights"
    assert "'dream'" in numbers["LT"]["computed_with"]
    kept = workspace.catalog.current("pictures", "seine.heist")
    assert evaluation_rows(workspace, "seine") and kept.files[0].name == "pictures.parquet"
    assert evaluation_rows(workspace) == [], "it is no generation of ours"


def test_the_same_pictures_again_compute_nothing_and_others_do(workspace, story, pictures):
    scored(workspace, story, pictures)
    plan = Pipeline(workspace, PROFILE)
    walk(plan, Request("score_pictures", story=story, pictures=pictures, name="seine"))
    assert plan.todo == [] and plan.fresh == 1
    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, "PNG")
    (pictures / "11.png").write_bytes(stream.getvalue())
    walk(plan, Request("score_pictures", story=story, pictures=pictures, name="seine"))
    assert [todo.subject for todo in plan.todo] == ["seine.heist"]


def test_the_characters_faces_come_from_the_dream_of_the_very_story(workspace, story, pictures):
    def plan() -> dict:
        pipeline, taken = Pipeline(workspace, PROFILE), []
        pipeline.step = lambda spec, works, states=(): taken.extend(works)
        walk(pipeline, Request("score_pictures", story=story, pictures=pictures, name="seine"))
        return taken[0].inputs

    assert set(plan()) == {"pictures"}
    told = workspace.catalog.current("story", "heist")
    for digest, roles in (("another story's", {"pictures"}), (told.digest, {"pictures", "dream"})):
        commit(workspace, "dream", "heist", Recipe("dream", 1, {}, {}, {"story": [digest]}), [])
        assert set(plan()) == roles
    ingest(workspace, "film.mp4")
    workspace.catalog.save_snapshot("s", [a.id for a in workspace.catalog.artifacts() if a.kind == "shards"])
    workspace.catalog.set_ref("snapshot/newest", "s")
    assert set(plan()) == {"pictures", "dream", "shards"}


def test_every_system_has_a_row_in_the_papers_tables_of_the_report(workspace, story, pictures):
    scored(workspace, story, pictures)
    scored(workspace, story, pictures, "storygen")
    assert list(all_evaluations(workspace)) == ["seine (heist)", "storygen (heist)"]
    page = render_page(gather(workspace))
    for text in ("Table 1 of the paper", "Table 2 of the paper", "storygen (heist)", "StoryDiffusion", "14.41"):
        assert text in page
    assert "not comparable with the paper" in page


def test_wrong_calls_say_what_is_wrong(workspace, story, pictures):
    pipeline = Pipeline(workspace, PROFILE)
    with pytest.raises(UsageError, match="the name 'a b' cannot be used"):
        walk(pipeline, Request("score_pictures", story=story, pictures=pictures, name="a b"))
    (pictures / "9.png").unlink()
    with pytest.raises(UsageError, match="holds 2 pictures, and the story has 3 frames"):
        walk(pipeline, Request("score_pictures", story=story, pictures=pictures, name="seine"))
    with pytest.raises(MissingInputError, match="nothing was generated yet"):
        walk(pipeline, Request("score_pictures", pictures=pictures, name="seine"))


def test_pictures_are_kept_in_row_groups_as_the_render_stage_keeps_its_own(workspace, tmp_path):
    count = 2 * ROW_GROUP + 3
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"frames": [{"plot": [f"Step {index}."]} for index in range(count)]}))
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (8, 6), (index, 0, 0)).save(folder / f"{index}.png")
    pipeline = computing_pipeline(workspace, PROFILE)
    subject = register_pictures(pipeline, register_story(pipeline, path), folder, "seine")
    kept = pipeline.get("pictures", subject)
    table = pq.ParquetFile(workspace.store.path(kept.file("pictures.parquet")))
    assert [table.metadata.row_group(group).num_rows for group in range(3)] == [ROW_GROUP, ROW_GROUP, 3]
    rows = table.read().to_pylist()
    assert [row["jpeg"] for row in rows] == [(folder / f"{index}.png").read_bytes() for index in range(count)]
    assert [row["frame_index"] for row in rows] == list(range(count)) and rows[0]["width_px"] == 8


def test_the_command_names_what_is_missing(monkeypatch, capsys, tmp_path, pictures, story):
    place = ("--workspace", tmp_path / "w")
    for arguments, message in (
        ([pictures], "Missing option '--name'"),
        ([pictures, "--name", "seine", "--story", tmp_path / "none.json"], "none.json"),
        ([tmp_path / "none", "--name", "seine", "--story", story], "no folder and no video at"),
    ):
        code, _, err = call(monkeypatch, capsys, "score-pictures", *arguments, *place)
        assert (code, message in err) == (2, True), err


def test_the_command_prints_numbers_and_tables(monkeypatch, capsys, workspace, pictures, story):
    scored(workspace, story, pictures)
    settings = ("--set", "evaluate.height_px=70", "--set", "evaluate.width_px=84")
    asked = (
        "score-pictures",
        pictures,
        "--name",
        "seine",
        "--story",
        story,
        "--workspace",
        workspace.folder,
        *settings,
    )
    code, out, err = call(monkeypatch, capsys, *asked, "--json")
    assert (code, json.loads(out)) == (0, evaluation_rows(workspace, "seine")), err
    tables = json.loads(call(monkeypatch, capsys, *asked, "--tables", "--json")[1])
    assert [table["table"] for table in tables] == [1, 2]
    assert tables[0]["rows"][-1]["method"] == "seine (heist)"
    text = call(monkeypatch, capsys, *asked, "--tables")[1]
    assert "Table 2: full-length videos" in text and "StreamingT2V" in text and "the paper" in text


def test_the_weights_of_the_evaluation_alone_are_asked_for():
    assert cli._stages_of("score_pictures") == ["evaluate"]
