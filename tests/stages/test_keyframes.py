"""The keyframes stage on real clips and on files that are none."""

import io
import subprocess
import sys
from itertools import pairwise

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError

from models import weights
from stages.errors import FilmError
from stages.keyframes import SPEC, Keyframes, KeyframesConfig
from stages.spec import Fail, Ok


@pytest.fixture(scope="module")
def bikes():
    return str(weights.folder("demo_films") / "bikes.mp4")


def run(film_uri, **settings):
    (outcome,) = Keyframes(KeyframesConfig(**settings))(film=[{"film_id": "-film 1", "uri": film_uri}])
    assert outcome.item == "-film 1"
    return outcome


def write_black_film(path, frames):
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        film.mux(stream.encode())
    return str(path)


def test_rows_fit_the_schema(bikes):
    table = pa.Table.from_pylist(list(run(bikes).rows), schema=SPEC.schema)
    assert table["frame_index"].to_pylist() == list(range(0, 250, 30))
    assert table["time_s"].to_pylist() == pytest.approx([index / 25 for index in range(0, 250, 30)])
    assert set(table["film_id"].to_pylist()) == {"-film 1"}
    assert table["shot_similarity"].null_count == 1
    shots = table["shot_index"].to_pylist()
    assert shots[0] == 0
    assert all(after - before in (0, 1) for before, after in pairwise(shots))
    first_of_shot = [shot not in shots[:at] for at, shot in enumerate(shots)]
    assert [motion is None for motion in table["motion"].to_pylist()] == first_of_shot


def test_pictures_are_the_films_own(bikes):
    rows = list(run(bikes, every_n_frames=100, jpeg_quality=98).rows)
    with av.open(bikes) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    for row in rows:
        picture = np.asarray(Image.open(io.BytesIO(row["jpeg"])), dtype=int)
        assert picture.shape == (row["height_px"], row["width_px"], 3)
        assert np.abs(picture - frames[row["frame_index"]]).mean() < 4


def test_the_longer_side_is_bounded(bikes):
    row = next(iter(run(bikes, max_side_px=160).rows))
    assert (row["width_px"], row["height_px"]) == (160, 68)
    assert (row["source_width_px"], row["source_height_px"]) == (640, 272)


def test_same_bytes_whatever_the_threads(bikes):
    assert list(run(bikes, decode_threads=1).rows) == list(run(bikes, decode_threads=3).rows)
    assert KeyframesConfig(decode_threads=3).recipe() == KeyframesConfig().recipe()


def test_a_black_film_is_one_shot(tmp_path):
    rows = list(run(write_black_film(tmp_path / "black.mp4", 40), every_n_frames=10).rows)
    assert [row["shot_index"] for row in rows] == [0, 0, 0, 0]
    assert [row["luma"] for row in rows] == [0.0] * 4


def test_a_film_of_a_single_frame(tmp_path):
    (row,) = run(write_black_film(tmp_path / "one.mp4", 1)).rows
    assert (row["frame_index"], row["time_s"], row["shot_similarity"], row["motion"]) == (0, 0.0, None, None)


def test_one_bad_film_does_not_stop_the_others(bikes, tmp_path):
    (tmp_path / "text.mp4").write_text("no film")
    films = [{"film_id": "bad", "uri": str(tmp_path / "text.mp4")}, {"film_id": "good", "uri": bikes}]
    bad, good = Keyframes(KeyframesConfig())(film=films)
    assert isinstance(bad, Fail)
    assert "text.mp4: not a film" in bad.error
    assert not bad.retryable
    assert isinstance(good, Ok)
    assert len(list(good.rows)) == 9


def test_limits_come_from_the_settings(bikes):
    assert "more than 5 s" in run(bikes, max_duration_s=5).error
    assert "more than 1000 pixels" in run(bikes, max_pixels=1000).error


def test_damage_found_while_decoding_is_raised_from_the_rows(tmp_path):
    path = tmp_path / "damaged.mp4"
    write_black_film(path, 20)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    end = start + int.from_bytes(data[start - 8 : start - 4], "big") - 8
    data[start:end] = b"\xff" * (end - start)
    path.write_bytes(data)
    with pytest.raises(FilmError, match="can be decoded"):
        list(run(str(path)).rows)


@pytest.mark.parametrize("settings", [{"every_n_frames": 0}, {"jpeg_quality": 101}, {"max_side_px": 1}, {"every": 2}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        KeyframesConfig(**settings)


def test_importing_the_stage_is_light():
    code = "import sys, stages.keyframes; print([m for m in ('torch', 'av', 'cv2', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
