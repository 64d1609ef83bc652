import json
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.weights import WeightsError
from stages.animate import SPEC, Animate, AnimateConfig, plan_clips
from stages.clip_model import SvdConfig
from stages.errors import ComputationError, MissingInputError
from stages.spec import no_progress
from tests.tiny_checkpoints import save_svd

pytestmark = pytest.mark.usefixtures("one_thread")


def draw_picture(seed: int, shift: int = 0, width: int = 64, height: int = 48) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 4, 3), dtype=np.uint8)
    wide = cv2.resize(noise, (2 * width, height), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(wide[:, shift : shift + width])


def encode_jpeg(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()


def write_pictures(path: Path, shots: list[int], jpegs: list[bytes] | None = None, first: int = 0) -> Path:
    jpegs = jpegs or [encode_jpeg(draw_picture(shot, 3 * i)) for i, shot in enumerate(shots)]
    rows = [
        {"frame_index": first + i, "shot_index": shot, "script": "{}", "jpeg": jpeg, "width_px": 64, "height_px": 48}
        for i, (shot, jpeg) in enumerate(zip(shots, jpegs, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def animate(tmp_path: Path, pictures: Path, name: str = "out", progress=no_progress, **settings) -> tuple[dict, Path]:
    out, scratch = tmp_path / name, tmp_path / f"{name}-scratch"
    out.mkdir()
    scratch.mkdir(exist_ok=True)
    config = AnimateConfig(**{"seconds_per_keyframe": 0.25, "fps": 12, "crf": 4, **settings})
    return Animate(config)({"pictures": [pictures]}, out, scratch, progress), out


def read_movie(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_movie_shows_every_picture_once_and_cuts_between_shots(tmp_path):
    shots = [0, 0, 0, 4, 4]
    summary, out = animate(tmp_path, write_pictures(tmp_path / "pictures.parquet", shots, first=10))
    frames = read_movie(out / "movie.mp4")
    assert summary["frames"] == len(frames) == 15 and summary["duration_s"] == 1.25
    for position, i in ((0, 0), (4, 1), (8, 2), (9, 3), (14, 4)):
        wanted = draw_picture(shots[i], 3 * i).astype(int)
        assert np.abs(frames[position] - wanted).mean() < 8, f"picture {i} is not the movie's frame {position}"
    assert np.abs(frames[8].astype(int) - frames[9]).mean() > 30
    assert json.loads((out / "clips.json").read_text()) == [
        {"shot_index": 0, "first_frame": 10, "last_frame": 12, "start_s": 0.0, "end_s": 0.75},
        {"shot_index": 4, "first_frame": 13, "last_frame": 14, "start_s": 0.75, "end_s": 1.25},
    ]
    assert sorted(p.name for p in out.iterdir()) == ["clips.json", "movie.mp4"]


def test_movie_is_what_browsers_play(tmp_path):
    _, out = animate(tmp_path, write_pictures(tmp_path / "pictures.parquet", [0, 0]))
    data = (out / "movie.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    with av.open(str(out / "movie.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.has_b_frames) == ("h264", "yuv420p", False)
        assert (context.colorspace, context.color_range) == (1, 1)


def test_a_single_picture_is_a_still_movie(tmp_path):
    summary, out = animate(tmp_path, write_pictures(tmp_path / "pictures.parquet", [7]))
    frames = read_movie(out / "movie.mp4")
    assert len(frames) == summary["frames"] == 3 and summary["clips"] == 1


@pytest.mark.parametrize(("height_px", "size"), [(None, (64, 48)), (96, (128, 96)), (31, (42, 32)), (2, (2, 2))])
def test_movie_has_even_sides_of_the_wanted_height(tmp_path, height_px, size):
    pictures = write_pictures(tmp_path / "pictures.parquet", [0])
    summary, out = animate(tmp_path, pictures, height_px=height_px)
    assert (summary["width_px"], summary["height_px"]) == size
    assert read_movie(out / "movie.mp4")[0].shape == (size[1], size[0], 3)


def test_same_pictures_give_the_same_bytes_also_after_a_killed_run(tmp_path):
    pictures = write_pictures(tmp_path / "pictures.parquet", [0, 0, 1, 2, 2])
    _, whole = animate(tmp_path, pictures, "whole")

    def kill(done: int, total: int, message: str) -> None:
        if message.startswith("clip 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        animate(tmp_path, pictures, "killed", kill)
    assert not (tmp_path / "killed" / "movie.mp4").exists()
    (tmp_path / "killed").rmdir()
    clip = tmp_path / "killed-scratch" / "clip-000000.mp4"
    written = clip.stat().st_mtime_ns
    _, resumed = animate(tmp_path, pictures, "killed")
    assert clip.stat().st_mtime_ns == written, "the finished clip was made again"
    for name in ("movie.mp4", "clips.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_progress_grows_to_the_number_of_frames(tmp_path):
    calls = []
    pictures = write_pictures(tmp_path / "pictures.parquet", [0, 0, 1])
    summary, _ = animate(tmp_path, pictures, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and done[-1] == summary["frames"] and {call[1] for call in calls} == {done[-1]}


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.floats(1, 60), st.floats(0.02, 5))
def test_plan_gives_every_picture_its_own_frame_without_drift(shots, fps, seconds):
    rate = Fraction(str(fps)).limit_denominator(1001)
    if seconds * rate < 1:
        seconds = 1 / float(rate) * 1.001
    clips = plan_clips(list(enumerate(shots)), rate, seconds)
    assert [i for clip in clips for i in clip.frame_indexes] == list(range(len(shots)))
    assert clips[-1].start + clips[-1].frames == round(len(shots) * seconds * rate)
    for clip in clips:
        positions = clip.positions()
        assert positions[0] == 0 and len(set(positions)) == len(positions) == len(clip.frame_indexes)
        assert positions == sorted(positions) and positions[-1] <= clip.frames - 1


def test_no_pictures_file_is_refused(tmp_path):
    with pytest.raises(MissingInputError, match="run stage render"):
        Animate(AnimateConfig())({}, tmp_path, tmp_path, no_progress)


def test_an_empty_pictures_file_is_refused(tmp_path):
    path = write_pictures(tmp_path / "pictures.parquet", [0])
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(ComputationError, match="holds no pictures"):
        animate(tmp_path, path)


def test_pictures_out_of_order_are_refused(tmp_path):
    path = write_pictures(tmp_path / "pictures.parquet", [0, 0])
    pq.write_table(pq.read_table(path).take([1, 0]), path)
    with pytest.raises(ComputationError, match="frame 0 follows frame 1"):
        animate(tmp_path, path)


@pytest.mark.parametrize("jpeg", [b"", b"no picture"])
def test_a_broken_picture_is_named(tmp_path, jpeg):
    path = write_pictures(tmp_path / "pictures.parquet", [0, 0], [encode_jpeg(draw_picture(0)), jpeg], first=5)
    with pytest.raises(ComputationError, match="frame 6 "):
        animate(tmp_path, path)


def test_less_than_a_frame_a_picture_is_refused():
    with pytest.raises(ValueError, match="at least 0.0417 seconds"):
        AnimateConfig(seconds_per_keyframe=0.01)


def test_a_full_disk_is_named_and_leaves_no_movie(tmp_path):
    pictures = write_pictures(tmp_path / "pictures.parquet", [0, 1, 2])
    script = f"""
import resource
from pathlib import Path
from stages.animate import Animate, AnimateConfig
from stages.spec import no_progress
from tests.tiny_checkpoints import save_svd
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, {resource.RLIM_INFINITY}))
folder = Path({str(tmp_path)!r})
Animate(AnimateConfig())({{"pictures": [folder / "pictures.parquet"]}}, folder, folder, no_progress)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "ComputationError: cannot write the movie" in done.stderr
    assert pictures.exists() and not (tmp_path / "movie.mp4").exists() and not list(tmp_path.glob("clip-*.mp4"))


def test_spec_loads_the_stage():
    assert SPEC.load() is Animate


@pytest.fixture(scope="module")
def svd(tmp_path_factory) -> dict:
    """Settings of the video model at a tiny size: a clip is four frames, one and a half seconds."""
    settings = {"frames": 4, "height_px": 64, "width_px": 64, "steps": 2, "fps": 2, "precision": "float32"}
    return settings | {"weights": str(save_svd(tmp_path_factory.mktemp("svd")))}


def animate_by_svd(tmp_path: Path, pictures: Path, svd: dict, name: str = "out", **settings) -> tuple[dict, Path]:
    return animate(
        tmp_path, pictures, name, **{"clips": "svd", "svd": svd, "fps": 4, "seconds_per_keyframe": 2.0} | settings
    )


def test_every_picture_begins_a_clip_of_the_video_model(tmp_path, svd):
    summary, out = animate_by_svd(tmp_path, write_pictures(tmp_path / "pictures.parquet", [0, 0, 4], first=10), svd)
    frames = read_movie(out / "movie.mp4")
    assert summary["frames"] == len(frames) == 24 and summary["duration_s"] == 6.0
    assert (summary["width_px"], summary["height_px"]) == (64, 48)
    for position, (shot, shift) in ((0, (0, 0)), (8, (0, 3)), (16, (4, 6))):
        assert np.abs(frames[position] - draw_picture(shot, shift).astype(int)).mean() < 8
        assert np.abs(frames[position + 2] - frames[position].astype(int)).mean() > 20, "nothing moves"
    clips = json.loads((out / "clips.json").read_text())
    assert [(clip["shot_index"], clip["first_frame"], clip["last_frame"]) for clip in clips] == [
        (0, 10, 10), (0, 11, 11), (4, 12, 12),
    ]  # fmt: skip
    assert [(clip["start_s"], clip["end_s"]) for clip in clips] == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]
    made = [one for clip in clips for one in clip["generated"]]
    assert [(one["start_s"], one["begins"], one["seed"]) for one in made] == [
        (0.0, "keyframe", 0), (1.5, "last_frame", 1), (2.0, "keyframe", 2), (3.5, "last_frame", 3),
        (4.0, "keyframe", 4), (5.5, "last_frame", 5),
    ]  # fmt: skip
    similarities = [one["similarity"] for one in made]
    assert all(-1 <= similarity <= 1 for similarity in similarities)
    assert summary["generated_clips"] == 6 and summary["reanchored_clips"] == 0
    assert summary["lowest_similarity"] == pytest.approx(min(similarities), abs=1e-4)


def test_a_clip_that_drifted_is_followed_by_one_from_the_keyframe(tmp_path, svd):
    pictures = write_pictures(tmp_path / "pictures.parquet", [0])
    summary, out = animate_by_svd(tmp_path, pictures, svd | {"reanchor_below": 1.0}, seconds_per_keyframe=3.0)
    (clip,) = json.loads((out / "clips.json").read_text())
    assert [(one["start_s"], one["begins"]) for one in clip["generated"]] == [(0.0, "keyframe"), (2.0, "anchor")]
    assert summary["reanchored_clips"] == 1
    frames = read_movie(out / "movie.mp4")
    assert np.abs(frames[6].astype(int) - frames[7]).mean() < 4, "the last frame before the cut does not stand"
    assert np.abs(frames[7].astype(int) - frames[8]).mean() > 8, "there is no cut"


def test_a_killed_run_of_the_video_model_goes_on_with_the_same_bytes(tmp_path, svd):
    pictures = write_pictures(tmp_path / "pictures.parquet", [0, 1])
    messages = []

    def kill(done: int, total: int, message: str) -> None:
        messages.append(message)
        if message == "clip 2 of 2, generation 1 of 2, step 2 of 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        animate_by_svd(tmp_path, pictures, svd, "killed", progress=kill)
    assert "clip 1 of 2, generation 2 of 2, step 1 of 2" in messages
    (tmp_path / "killed").rmdir()
    clip = tmp_path / "killed-scratch" / "clip-000000.mp4"
    written = clip.stat().st_mtime_ns
    first, resumed = animate_by_svd(tmp_path, pictures, svd, "killed")
    assert clip.stat().st_mtime_ns == written, "the finished clip was made again"
    second, whole = animate_by_svd(tmp_path, pictures, svd, "whole")
    assert first == second
    for name in ("movie.mp4", "clips.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_progress_of_the_video_model_grows_to_the_number_of_frames(tmp_path, svd):
    calls = []
    pictures = write_pictures(tmp_path / "pictures.parquet", [0, 1])
    summary, _ = animate_by_svd(tmp_path, pictures, svd, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and len(calls) == 2 * (2 * 2 + 1)
    assert done[-1] == summary["frames"] and {call[1] for call in calls} == {done[-1]}


def test_a_picture_that_gets_one_frame_needs_no_clip(tmp_path, svd):
    pictures = write_pictures(tmp_path / "pictures.parquet", [0])
    summary, out = animate_by_svd(tmp_path, pictures, svd, seconds_per_keyframe=0.25)
    assert summary["frames"] == 1 and "generated_clips" not in summary
    assert json.loads((out / "clips.json").read_text())[0]["generated"] == []


def test_weights_that_are_not_there_are_named(tmp_path, svd):
    pictures = write_pictures(tmp_path / "pictures.parquet", [0])
    with pytest.raises(WeightsError, match="svd_xt.*weights pull svd_xt"):
        config = AnimateConfig(clips="svd")
        Animate(config, tmp_path / "none")({"pictures": [pictures]}, tmp_path, tmp_path, no_progress)


def test_the_video_model_counts_only_where_it_runs():
    flow, video = AnimateConfig(), AnimateConfig(clips="svd")
    assert flow.weights() == () and video.weights() == ("svd_xt",)
    assert video.is_heavy() and not flow.is_heavy()
    assert flow.recipe() == AnimateConfig(svd=SvdConfig(steps=9)).recipe() and "svd" not in flow.recipe()
    others = {"steps": 9, "offload": True, "weights": "/mine"}
    recipes = [AnimateConfig(clips="svd", svd=SvdConfig(**{k: v})).recipe() for k, v in others.items()]
    assert [recipe == video.recipe() for recipe in recipes] == [False, True, True]


def test_guidance_that_falls_is_refused():
    with pytest.raises(ValueError, match="max_guidance 1.0 is less than min_guidance 2.0"):
        SvdConfig(min_guidance=2, max_guidance=1)


@given(st.integers(2, 30), st.integers(1, 30), st.floats(1, 60), st.floats(0.02, 20))
def test_chained_clips_fill_a_keyframes_time(frames, model_fps, fps, seconds):
    config = SvdConfig(frames=frames, fps=model_fps)
    rate = Fraction(str(fps)).limit_denominator(1001)
    clips = plan_clips([(0, 0), (1, 0), (2, 1)], rate, max(seconds, 1.001 / float(rate)), whole_shots=False)
    assert [clip.frame_indexes for clip in clips] == [(0,), (1,), (2,)]
    needed = max(float((clip.frames - 1) * model_fps / rate) for clip in clips)
    assert config.clips_in(max(seconds, 1.001 / float(rate))) * (frames - 1) >= needed
