from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from models.video_writer import VideoWriter, join_films


def draw_frames(count: int, seed: int = 0, size: tuple[int, int] = (32, 48)) -> list[np.ndarray]:
    """Flat colours, which survive compression nearly unchanged."""
    colours = np.random.default_rng(seed).integers(30, 226, (count, 3), dtype=np.uint8)
    return [np.broadcast_to(colour, (*size, 3)).copy() for colour in colours]


def write_film(path: Path, frames: list[np.ndarray], fps: Fraction = Fraction(24), crf: int = 4) -> Path:
    height, width = frames[0].shape[:2]
    with VideoWriter(path, width_px=width, height_px=height, fps=fps, crf=crf) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def read_film(path: Path) -> tuple[list[float], list[np.ndarray]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.time for frame in frames], [frame.to_ndarray(format="rgb24") for frame in frames]


def test_colours_come_back(tmp_path):
    frames = draw_frames(6)
    _, found = read_film(write_film(tmp_path / "film.mp4", frames))
    assert np.abs(np.stack(frames).astype(int) - np.stack(found)).max() <= 8


def test_same_frames_give_the_same_bytes(tmp_path):
    frames = draw_frames(6)
    first, second = (write_film(tmp_path / name, frames).read_bytes() for name in ("a.mp4", "b.mp4"))
    assert first == second


@pytest.mark.parametrize("fps", [Fraction(24), Fraction(24000, 1001), Fraction(3)])
@pytest.mark.parametrize("counts", [(1,), (1, 1, 5), (7, 1, 3)])
def test_joined_films_keep_every_frame_and_its_time(tmp_path, fps, counts):
    clips = [draw_frames(count, seed) for seed, count in enumerate(counts)]
    paths = [write_film(tmp_path / f"{i}.mp4", frames, fps) for i, frames in enumerate(clips)]
    join_films(paths, tmp_path / "joined.mp4")
    times, found = read_film(tmp_path / "joined.mp4")
    assert times == pytest.approx([i / float(fps) for i in range(sum(counts))], abs=1e-4)
    separate = [frame for path in paths for frame in read_film(path)[1]]
    assert np.array_equal(np.stack(found), np.stack(separate)), "joining must not encode again"


def test_index_stands_before_the_pictures(tmp_path):
    path = write_film(tmp_path / "film.mp4", draw_frames(3))
    join_films([path, path], tmp_path / "joined.mp4")
    for film in (path, tmp_path / "joined.mp4"):
        data = film.read_bytes()
        assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("size", [(48, 31), (31, 48), (0, 0)])
def test_odd_sides_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match="must be even"):
        VideoWriter(tmp_path / "film.mp4", width_px=size[0], height_px=size[1], fps=Fraction(24), crf=20)
    assert not (tmp_path / "film.mp4").exists()


def test_a_frame_of_another_size_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="frame is"),
        VideoWriter(tmp_path / "film.mp4", width_px=48, height_px=32, fps=Fraction(24), crf=20) as writer,
    ):
        writer.write(draw_frames(1, size=(32, 32))[0])


def test_a_folder_that_is_not_there_is_an_error_of_the_file(tmp_path):
    with pytest.raises(av.FFmpegError, match="No such file"):
        write_film(tmp_path / "nowhere" / "film.mp4", draw_frames(1))


def test_joining_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no films"):
        join_films([], tmp_path / "joined.mp4")


def test_joining_two_encodings_is_refused(tmp_path):
    first = write_film(tmp_path / "first.mp4", draw_frames(2))
    second = write_film(tmp_path / "second.mp4", draw_frames(2, size=(64, 48)))
    with pytest.raises(ValueError, match="second.mp4 was encoded otherwise than first.mp4"):
        join_films([first, second], tmp_path / "joined.mp4")
