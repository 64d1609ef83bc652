"""Films that are whole, odd or broken: what opens, what is refused and why, and that no frame is ever another one."""

import hashlib
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from models.frames import Picture, _BrokenPromiseError, _read_needed, read_frames, square_size, turn_upright
from models.video import Limits, VideoError, open_film

LIMITS = Limits(max_duration_s=3600.0, max_pixels=1 << 22)
SIZE_PX = (96, 64)


def write_film(path: Path, frames=80, codec="libx264", params="", times=None, muxer=None, **options) -> Path:
    """A textured picture that moves, with a cut at each 30th frame."""
    rng = np.random.default_rng(0)
    textures = np.kron(rng.integers(0, 255, (4, 40, 60, 3), dtype=np.uint8), np.ones((1, 4, 4, 1), np.uint8))
    width, height = SIZE_PX
    if params:
        options["x265-params" if codec == "libx265" else "x264-params"] = params
    with av.open(str(path), "w", options=muxer or {}) as film:
        stream = film.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            texture = np.roll(textures[index // 30 % 4], (index, 2 * index), axis=(0, 1))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[:height, :width]), format="rgb24")
            frame.pts = times[index] if times else index
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return path


def remux(source: Path, target: Path, edit_packets=None, prepare=None, options=None) -> Path:
    """Copy the packets of a film; `edit_packets` changes their list, `prepare` the output stream."""
    with av.open(str(source)) as film, av.open(str(target), "w", options=options or {}) as copy:
        stream = copy.add_stream_from_template(film.streams.video[0])
        if prepare:
            prepare(stream)
        copy.start_encoding()
        packets = [packet for packet in film.demux(video=0) if packet.size]
        for packet in edit_packets(packets) if edit_packets else packets:
            packet.stream = stream
            copy.mux(packet)
    return target


def digest(pictures) -> list[tuple[int, float, str]]:
    """Index, time and SHA-256 of each picture."""
    return [(p.frame_index, p.time_s, hashlib.sha256(p.rgb.tobytes()).hexdigest()) for p in pictures]


def decode_naively(path: Path, every: int) -> list[tuple[int, str]]:
    """The definition: decode every frame, keep each n-th."""
    with av.open(str(path)) as film:
        kept = [(i, f) for i, f in enumerate(film.decode(video=0)) if i % every == 0]
    return [(i, hashlib.sha256(f.to_ndarray(format="rgb24").tobytes()).hexdigest()) for i, f in kept]


FILMS = {
    "b-frames.mp4": {"params": "keyint=40:bframes=3"},
    "many-b-frames.mkv": {"params": "keyint=25:bframes=8:b-adapt=2"},
    "no-b-frames.mp4": {"params": "keyint=20:bframes=0"},
    "open-gop.mp4": {"params": "keyint=20:min-keyint=5:open-gop=1:scenecut=0"},
    "open-gop.ts": {"params": "keyint=20:min-keyint=5:open-gop=1"},
    "open-gop-no-pyramid.mkv": {"params": "keyint=20:open-gop=1:b-pyramid=none:scenecut=0"},
    "intra-refresh.mp4": {"params": "keyint=20:intra-refresh=1"},
    "interlaced.mp4": {"params": "keyint=20:interlaced=1"},
    "variable-rate.mp4": {"params": "keyint=20", "times": [i * 3 + (i * i) % 3 for i in range(80)]},
    "late-start.mkv": {"params": "keyint=20", "times": [500 + i for i in range(80)]},
    "open-gop-h265.mp4": {"codec": "libx265", "params": "keyint=20:open-gop=1:log-level=error"},
    "closed-gop-h265.mkv": {"codec": "libx265", "params": "keyint=20:open-gop=0:log-level=error"},
    "sub-layers-h265.mp4": {"codec": "libx265", "params": "keyint=20:temporal-layers=2:log-level=error"},
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2", "g": "20"},
    "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "g": "20"},
    "raw.h264": {"params": "keyint=20"},
    "fragmented.mp4": {"params": "keyint=20", "muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "single-frame.mp4": {"frames": 1},
}
PROVEN = {
    *("b-frames.mp4", "many-b-frames.mkv", "no-b-frames.mp4", "open-gop.mp4", "open-gop.ts", "open-gop-no-pyramid.mkv"),
    *("intra-refresh.mp4", "variable-rate.mp4", "late-start.mkv", "open-gop-h265.mp4", "closed-gop-h265.mkv"),
    *("fragmented.mp4", "single-frame.mp4"),
}


@pytest.mark.parametrize("name", FILMS)
def test_every_way_of_reading_gives_the_same_frames(name, tmp_path):
    path = write_film(tmp_path / name, **FILMS[name])
    film = open_film(path, LIMITS)
    assert (film.obstacle is None) == (name in PROVEN), film.obstacle
    for every in (1, 7, 30):
        reference = digest(read_frames(film, every, decode_all=True))
        assert [(index, sha) for index, _, sha in reference] == decode_naively(path, every)
        assert digest(read_frames(film, every)) == reference
        assert digest(read_frames(film, every, threads=3)) == reference


@pytest.mark.parametrize("name", sorted(PROVEN))
def test_the_index_keeps_its_promises_on_sound_films(name, tmp_path):
    film = open_film(write_film(tmp_path / name, **FILMS[name]), LIMITS)
    for every in (1, 7, 30):
        assert len(list(_read_needed(film, every, None, threads=1))) == -(-len(film.entries) // every)


def test_leaves_out_what_no_wanted_frame_needs(tmp_path):
    film = open_film(write_film(tmp_path / "film.mp4", frames=100, params="keyint=50:bframes=3:scenecut=0"), LIMITS)
    segments = film.plan_segments(40)
    decoded = sum(film.is_needed(at, segment) for segment in segments for at in range(segment.begin, segment.last + 1))
    assert [sorted(segment.wanted.values()) for segment in segments] == [[0, 40], [80]]
    assert decoded < 50


def test_edit_list_hides_frames_but_keeps_them_as_references(tmp_path):
    source = write_film(tmp_path / "source.mp4", params="keyint=40:bframes=3")

    def shift(packets):
        for packet in packets:
            packet.pts, packet.dts = packet.pts - 10 * 512, packet.dts - 10 * 512
        return packets

    path = remux(source, tmp_path / "edited.mp4", shift)
    film = open_film(path, LIMITS)
    assert sum(not entry.shown for entry in film.entries) == 10
    pictures = digest(read_frames(film, 7))
    assert pictures == digest(read_frames(film, 7, decode_all=True))
    assert [(i, sha) for i, _, sha in pictures] == decode_naively(path, 7)
    assert pictures[0][:2] == (0, 0.0)


def test_times_follow_the_timestamps(tmp_path):
    times = [100, 101, 105, 106, 120, 121]
    film = open_film(write_film(tmp_path / "film.mkv", frames=6, times=times), LIMITS)
    seen = [picture.time_s for picture in read_frames(film, 2)]
    assert seen == pytest.approx([0.0, 5 / 25, 20 / 25], abs=1e-3)


def test_damage_that_the_index_cannot_show_falls_back_to_decoding_everything(tmp_path):
    path = write_film(tmp_path / "film.mp4", params="keyint=40:bframes=0:scenecut=0")
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][20]
    data = bytearray(path.read_bytes())
    middle = packet.pos + packet.size // 2
    data[middle : middle + 40] = bytes(b ^ 0x5A for b in data[middle : middle + 40])
    path.write_bytes(data)
    film = open_film(path, LIMITS)
    assert film.obstacle is None
    with pytest.raises(_BrokenPromiseError):
        list(_read_needed(film, 3, None, threads=1))
    reference = digest(read_frames(film, 3, decode_all=True))
    assert digest(read_frames(film, 3)) == reference
    assert digest(read_frames(film, 3, threads=2)) == reference


def test_an_unread_generator_leaves_no_thread_behind(tmp_path):
    film = open_film(write_film(tmp_path / "film.mp4", params="keyint=10"), LIMITS)
    pictures = read_frames(film, 1, threads=2)
    next(pictures)
    pictures.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode-")]


@pytest.mark.parametrize("name", ["a film.mp4", 'it\'s "1".mp4', "-i.mp4", "concat:a|b.mp4", "%d.mp4", "http:x.mp4"])
def test_a_name_is_only_a_name(name, tmp_path, monkeypatch):
    write_film(tmp_path / "plain.mp4", frames=3).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(list(read_frames(open_film(name, LIMITS), 1))) == 3


def test_bounds_the_longer_side(tmp_path):
    (picture, *_) = read_frames(open_film(write_film(tmp_path / "film.mp4", frames=2), LIMITS), 1, max_side_px=48)
    assert picture.rgb.shape == (32, 48, 3)
    assert (picture.source_width_px, picture.source_height_px) == SIZE_PX


def test_rotation_turns_the_picture(tmp_path):
    source = write_film(tmp_path / "source.mp4", frames=3)
    turned = remux(source, tmp_path / "turned.mp4", prepare=lambda stream: stream.set_display_rotation(90))
    (plain, *_) = read_frames(open_film(source, LIMITS), 1)
    (upright, *_) = read_frames(open_film(turned, LIMITS), 1)
    assert np.array_equal(upright.rgb, np.rot90(plain.rgb))  # 90 degrees counterclockwise
    assert (upright.source_width_px, upright.source_height_px) == SIZE_PX[::-1]


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), [[0, 1, 2], [3, 4, 5]]),
        ((-1, 0, 0, 1), [[2, 1, 0], [5, 4, 3]]),
        ((-1, 0, 0, -1), [[5, 4, 3], [2, 1, 0]]),
        ((0, 1, -1, 0), [[3, 0], [4, 1], [5, 2]]),
        ((0, -1, 1, 0), [[2, 5], [1, 4], [0, 3]]),
        ((0, 1, 1, 0), [[0, 3], [1, 4], [2, 5]]),
    ],
)
def test_display_matrix(matrix, expected):
    rgb = np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3, 1), 3, axis=2)
    assert turn_upright(rgb, matrix)[0][:, :, 0].tolist() == expected


def test_pixels_become_square(tmp_path):
    assert square_size(720, 576, 64 / 45) == (1024, 576)
    assert square_size(800, 332, 399 / 400) == (800, 333)
    assert square_size(800, 332, 0.0) == (800, 332)
    path = write_film(tmp_path / "film.mp4", frames=2, params="sar=2/1")
    (picture, *_) = read_frames(open_film(path, LIMITS), 1)
    assert picture.rgb.shape == (64, 192, 3)


@pytest.mark.parametrize(("full", "expected"), [("off", 255), ("on", 235)])
def test_colour_range_is_honoured(full, expected, tmp_path):
    path = tmp_path / "white.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=25, options={"x264-params": f"fullrange={full}:qp=0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        planes = np.concatenate([np.full((64, 64), 235, np.uint8), np.full((32, 64), 128, np.uint8)])
        film.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        film.mux(stream.encode())
    (picture,) = read_frames(open_film(path, LIMITS), 1)
    assert picture.rgb.mean() == pytest.approx(expected, abs=1.5)


def refusal(path: Path, limits: Limits = LIMITS) -> str:
    with pytest.raises(VideoError) as caught:
        for _ in read_frames(open_film(path, limits), 30):
            pass
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_refuses_an_absent_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.mp4")


def test_refuses_a_folder(tmp_path):
    assert "no such file" in refusal(tmp_path)


def test_refuses_an_empty_file(tmp_path):
    (tmp_path / "empty.mp4").touch()
    assert "empty (0 bytes)" in refusal(tmp_path / "empty.mp4")


@pytest.mark.parametrize(
    "text", ["no film at all\n" * 99, "#EXTM3U\n#EXTINF:1,\nother.ts\n", "ffconcat version 1.0\nfile plain.mp4\n"]
)
def test_refuses_text_and_playlists(text, tmp_path):
    write_film(tmp_path / "plain.mp4", frames=2)
    (tmp_path / "text.mp4").write_text(text)
    assert "not a film" in refusal(tmp_path / "text.mp4")


def test_refuses_sound_alone(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as film:
        stream = film.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        film.mux(stream.encode(frame))
        film.mux(stream.encode())
    assert "no video stream (streams found: audio)" in refusal(tmp_path / "sound.mp4")


def test_refuses_a_stream_without_frames(tmp_path):
    source = write_film(tmp_path / "source.mp4", frames=2)
    path = remux(source, tmp_path / "none.mp4", lambda packets: [], options={"movflags": "empty_moov+frag_keyframe"})
    assert "no frames" in refusal(path)


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv"])
def test_refuses_a_truncated_film(name, tmp_path):
    source = write_film(tmp_path / "source.mp4", frames=200, params="keyint=20")
    whole = remux(source, tmp_path / name, options={"movflags": "faststart"} if name.endswith("4") else {})
    (tmp_path / f"half-{name}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "truncated" in refusal(tmp_path / f"half-{name}")


def test_refuses_a_film_cut_off_before_its_index(tmp_path):
    whole = write_film(tmp_path / "whole.mp4")
    (tmp_path / "half.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "cut off before its index" in refusal(tmp_path / "half.mp4")


def test_refuses_absurd_durations(tmp_path):
    path = write_film(tmp_path / "long.mkv", frames=3, times=[0, 1, 25 * 100_000])
    assert "more than 3600 s" in refusal(path)


def test_refuses_absurd_dimensions(tmp_path):
    path = write_film(tmp_path / "film.mp4", frames=2)
    assert "96 x 64" in refusal(path, Limits(max_duration_s=3600.0, max_pixels=96 * 64 - 1))


def test_refuses_a_film_of_nothing_but_damage(tmp_path):
    source = write_film(tmp_path / "source.mp4", frames=20)
    data = bytearray(source.read_bytes())
    start = data.index(b"mdat") + 4
    end = start + int.from_bytes(data[start - 8 : start - 4], "big") - 8
    data[start:end] = b"\xff" * (end - start)
    (tmp_path / "damaged.mp4").write_bytes(data)
    assert "can be decoded" in refusal(tmp_path / "damaged.mp4")


def test_a_picture_is_rgb(tmp_path):
    (picture,) = read_frames(open_film(write_film(tmp_path / "film.mp4", frames=1), LIMITS), 30)
    assert isinstance(picture, Picture)
    assert picture.rgb.dtype == np.uint8
