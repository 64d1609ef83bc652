import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from models.weights import WeightsError
from stages.baseline import SPEC, USUAL, Baseline, BaselineConfig
from stages.errors import MissingInputError, StoryError, UsageError
from stages.render import PICTURES_SCHEMA
from stages.spec import StageConfig, no_progress
from tests.tiny_pipelines import (
    write_motion_adapter,
    write_sd15_pipeline,
    write_sdxl_pipeline,
    write_svd_pipeline,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STORY = {
    "characters": [{"identity": "Anna", "description": ["a tall girl in red"]}],
    "frames": [
        {"characters": [{"identity": "Anna"}], "plot": ["runs to a big sea"], "shot": 0},
        {"scene_elements": ["night and fog"], "plot": ["a dog is far off"]},
        {"characters": [{"identity": "Anna"}], "plot": ["calls it"], "shot": 3},
    ],
}
WRITERS = {
    "sdxl": write_sdxl_pipeline,
    "svd": write_svd_pipeline,
    "stable_diffusion": write_sd15_pipeline,
    "motion_adapter": write_motion_adapter,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weights")
    return {name: write(root / name) for name, write in WRITERS.items()}


def configure(folders: dict[str, Path], method: str, **settings) -> BaselineConfig:
    small = {"sampling_steps": 2, "guidance": 2.0, "width_px": 32, "height_px": 16, "seconds_per_keyframe": 0.5}
    small |= {"window_pictures": 2, "overlap_pictures": 1, "precision": "float32"}
    places = {name: str(path) for name, path in folders.items()}
    return BaselineConfig(method=method, **(places | small | settings))


def paint(config: BaselineConfig, folder: Path, story: dict = STORY, progress=no_progress, **inputs: Path) -> list:
    """Run the stage on a story in a folder; returns the rows of its pictures."""
    out = folder / "out"
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    out.mkdir(exist_ok=True)
    (folder / "story.json").write_text(json.dumps(story))
    given = {"story": [folder / "story.json"]} | {role: [path] for role, path in inputs.items()}
    summary = Baseline(config)(given, out, folder / "scratch", progress)
    table = pq.read_table(out / "pictures.parquet")
    assert table.schema == PICTURES_SCHEMA
    assert (summary["pictures"], summary["method"]) == (len(table), config.method)
    return table.to_pylist()


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)), np.int16)


@pytest.mark.parametrize("method", USUAL)
def test_every_frame_gets_its_picture_and_a_seed_its_pictures(folders, tmp_path, method):
    calls: list[tuple[int, int, str]] = []
    config = configure(folders, method)
    rows = paint(config, tmp_path / "a", progress=lambda *call: calls.append(call))
    assert [(row["frame_index"], row["shot_index"]) for row in rows] == [(0, 0), (1, 0), (2, 3)]
    assert [json.loads(row["script"])["plot"] for row in rows] == [frame["plot"] for frame in STORY["frames"]]
    assert json.loads(rows[0]["script"])["characters"][0]["description"] == ["a tall girl in red"]
    for row in rows:
        assert pixels(row["jpeg"]).shape == (row["height_px"], row["width_px"], 3) == (16, 32, 3)
    assert len({row["jpeg"] for row in rows}) == 3
    done = [call[0] for call in calls]
    assert (done, calls[-1][0]) == (sorted(done), calls[-1][1])
    assert len(calls) > config.sampling_steps
    if method != "freenoise":  # the others' seeds are told apart by their starting noise in the same way
        assert paint(config.model_copy(update={"seed": 1}), tmp_path / "c") != rows
    assert paint(config, tmp_path / "b") == rows


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", USUAL)
def test_a_killed_run_goes_on_with_what_is_missing(folders, tmp_path, method):
    config = configure(folders, method, sampling_steps=3)
    whole: list[str] = []
    rows = paint(config, tmp_path / "whole", progress=lambda *call: whole.append(call[2]))

    def kill(done: int, total: int, message: str) -> None:
        if done >= 2 * total / 3:
            raise Killed

    with pytest.raises(Killed):
        paint(config, tmp_path / "killed", progress=kill)
    rest: list[str] = []
    assert paint(config, tmp_path / "killed", progress=lambda *call: rest.append(call[2])) == rows
    assert len(rest) < len(whole)


def test_frames_know_nothing_of_each_other_without_memory(folders, tmp_path):
    config = configure(folders, "frame_by_frame")
    rows = paint(config, tmp_path / "a")
    other = paint(config, tmp_path / "b", _with_plot("the sun"))
    assert [a["jpeg"] == b["jpeg"] for a, b in zip(rows, other, strict=True)] == [True, False, True]


def test_frames_of_a_window_and_of_later_ones_look_at_each_other(folders, tmp_path):
    config = configure(folders, "consistent_attention")
    rows = paint(config, tmp_path / "a")
    other = paint(config, tmp_path / "b", _with_plot("the sun"))
    assert [a["jpeg"] == b["jpeg"] for a, b in zip(rows, other, strict=True)] == [False, False, False]
    alone = config.model_copy(update={"sampling_rate": 0.0})
    rows, other = paint(alone, tmp_path / "c"), paint(alone, tmp_path / "d", _with_plot("the sun"))
    assert [a["jpeg"] == b["jpeg"] for a, b in zip(rows, other, strict=True)] == [True, False, True]


def _with_plot(plot: str) -> dict:
    frames = [frame | ({"plot": [plot]} if index == 1 else {}) for index, frame in enumerate(STORY["frames"])]
    return STORY | {"frames": frames}


def test_a_chain_starts_from_the_picture_that_is_given(folders, tmp_path):
    config = configure(folders, "svd_chain", first_picture="given", sdxl="nowhere")
    made = []
    for color in ("red", "blue"):
        first = tmp_path / f"{color}.png"
        Image.new("RGB", (100, 80), color).save(first)
        made.append(paint(config, tmp_path / color, references=first))
    assert made[0] != made[1]
    with pytest.raises(MissingInputError, match="no picture is: name one with --first"):
        paint(config, tmp_path / "none")


def test_what_has_no_room_in_a_prompt_is_told(folders, tmp_path):
    long = {"frames": [{"plot": ["a dog runs", "and " * 40 + "on"]}]}
    config = configure(folders, "frame_by_frame")
    paint(config, tmp_path, long)
    (told,) = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert told == {"frame_index": 0, "prompt": "a dog runs", "left_out": ["and " * 40 + "on"]}


@pytest.mark.parametrize(
    ("method", "role", "part", "what"),
    [
        ("frame_by_frame", "sdxl", "text_encoder_2", "no SDXL pipeline at"),
        ("consistent_attention", "sdxl", "vae", "no SDXL pipeline at"),
        ("frame_by_frame", "sdxl", "scheduler", "no SDXL pipeline at"),
        ("frame_by_frame", "sdxl", "tokenizer_2", "tokenizer_2 holds neither vocab.json nor tokenizer.json"),
        ("svd_chain", "svd", "image_encoder", "no Stable Video Diffusion pipeline at"),
        ("svd_chain", "svd", "feature_extractor", "no Stable Video Diffusion pipeline at"),
        ("freenoise", "stable_diffusion", "tokenizer", "no Stable Diffusion pipeline with the motion modules of"),
        ("freenoise", "motion_adapter", "config.json", "no Stable Diffusion pipeline with the motion modules of"),
    ],
)
def test_a_part_that_is_not_there_is_an_error(folders, tmp_path, method, role, part, what):
    broken = tmp_path / "broken"
    shutil.copytree(folders[role], broken)
    shutil.rmtree(broken / part) if (broken / part).is_dir() else (broken / part).unlink()
    with pytest.raises(WeightsError, match=what) as raised:
        paint(configure(folders, method, **{role: str(broken)}), tmp_path)
    assert "bring all folders of the pipeline" in str(raised.value)


def test_what_cannot_be_painted_is_refused(folders, tmp_path):
    with pytest.raises(StoryError, match=r"frame 1 \(frames\[0\]\): no sentence"):
        paint(configure(folders, "frame_by_frame"), tmp_path, {"frames": [{}]})
    with pytest.raises(UsageError, match="baseline.method is null: expected one of frame_by_frame"):
        paint(configure(folders, None), tmp_path)
    with pytest.raises(MissingInputError, match="needs a story"):
        Baseline(configure(folders, "freenoise"))({}, tmp_path, tmp_path, no_progress)
    with pytest.raises(ValidationError, match="overlap_pictures 4 leaves no new picture in a window of 4"):
        BaselineConfig(window_pictures=4)


def test_a_first_picture_that_is_none_is_refused_before_anything_is_loaded(folders, tmp_path):
    config = configure(folders, "svd_chain", first_picture="given", svd=str(tmp_path / "nowhere"))
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    for name, data in (("letter.png", b"dear reader"), ("half.png", whole.read_bytes()[:1000]), ("empty.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(StoryError, match=f"{name}: cannot be read as a picture .* give a JPEG or PNG file"):
            paint(config, tmp_path, references=tmp_path / name)
    with pytest.raises(WeightsError):
        paint(config, tmp_path, references=whole)


def test_a_story_too_long_for_one_batch_of_latents_is_refused_before_anything_is_loaded(folders, tmp_path):
    config = configure(folders, "freenoise", stable_diffusion=str(tmp_path / "nowhere"), seconds_per_keyframe=1.0)
    longest = {"frames": [{"plot": ["a dog runs"]}] * 128}
    with pytest.raises(WeightsError):
        paint(config, tmp_path, longest)
    longer = {"frames": [{"plot": ["a dog runs"]}] * 129}
    with pytest.raises(StoryError, match=r"129 keyframes, 1 s apart, .* 1025 frames.* up to 1024: lower baseline"):
        paint(config, tmp_path, longer)


def test_half_precision_is_near_the_whole_on_any_device(folders, tmp_path):
    whole = paint(configure(folders, "frame_by_frame"), tmp_path / "whole")
    half = paint(configure(folders, "frame_by_frame", precision="float16"), tmp_path / "half")
    assert half != whole
    for a, b in zip(half, whole, strict=True):
        assert np.abs(pixels(a["jpeg"]) - pixels(b["jpeg"])).mean() < 5


CHANGES = {
    "sampling_steps": 7, "guidance": 7.0, "width_px": 64, "height_px": 64, "seed": 7, "jpeg_quality": 70,
    "precision": "float32", "sampling_rate": 0.7, "window_pictures": 17, "overlap_pictures": 7,
    "seconds_per_keyframe": 7.0, "first_picture": "given", "sdxl": "sd15", "svd": "sd15", "stable_diffusion": "sdxl",
    "motion_adapter": "sdxl",
}  # fmt: skip
OWN = {
    "frame_by_frame": {"sdxl"},
    "consistent_attention": {"sdxl", "sampling_rate", "window_pictures", "overlap_pictures"},
    "svd_chain": {"sdxl", "svd", "seconds_per_keyframe", "first_picture"},
    "freenoise": {"stable_diffusion", "motion_adapter", "seconds_per_keyframe"},
}
SHARED = {"sampling_steps", "guidance", "width_px", "height_px", "seed", "jpeg_quality", "precision"}


@pytest.mark.parametrize("method", USUAL)
def test_only_settings_that_matter_to_a_system_make_it_paint_again(method):
    own = set(BaselineConfig.model_fields) - set(StageConfig.model_fields)
    assert {"method", *CHANGES} == own, "a new setting matters to some system"
    config = BaselineConfig(method=method)
    told = {name for name, value in CHANGES.items()
            if config.model_copy(update={name: value}).recipe() != config.recipe()}  # fmt: skip
    assert told == OWN[method] | SHARED
    given = BaselineConfig(method="svd_chain", first_picture="given")
    assert given.model_copy(update={"sdxl": "sd15"}).recipe() == given.recipe()


def test_settings_name_the_weights_and_not_their_places(folders):
    assert SPEC.load() is Baseline
    assert BaselineConfig().weights() == ()
    assert BaselineConfig(method="svd_chain").weights() == ("svd_xt", "sdxl")
    assert BaselineConfig(method="svd_chain", first_picture="given").weights() == ("svd_xt",)
    assert BaselineConfig(method="freenoise").weights() == ("sd15", "animatediff_v15_2")
    recipe = configure(folders, "frame_by_frame").recipe()
    assert not set(recipe) & set(folders)
    assert BaselineConfig(method="frame_by_frame").recipe()["sdxl"] == "sdxl"
