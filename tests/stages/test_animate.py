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

from stages.animate import SPEC, Animate, AnimateConfig, plan_clips
from stages.errors import ComputationError, MissingInputError
from stages.spec import no_progress


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
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, {resource.RLIM_INFINITY}))
folder = Path({str(tmp_path)!r})
Animate(AnimateConfig())({{"pictures": [folder / "pictures.parquet"]}}, folder, folder, no_progress)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "ComputationError: cannot write the movie" in done.stderr
    assert pictures.exists() and not (tmp_path / "movie.mp4").exists() and not list(tmp_path.glob("clip-*.mp4"))


def test_spec_loads_the_stage():
    assert SPEC.load() is Animate
