import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from models.picture_files import PictureError, read_pictures


def write_picture(path: Path, shade: int) -> bytes:
    Image.new("RGB", (32, 24), (shade, shade, shade)).save(path)
    return path.read_bytes()


def write_video(path: Path, shades: list[int]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "1"}
        for shade in shades:
            picture = np.full((48, 64, 3), shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def test_pictures_come_by_the_numbers_in_their_names_and_as_they_are(tmp_path):
    names = ("frame-2.png", "frame-10.jpg", "frame-1.webp", "frame-11.JPEG")
    written = {name: write_picture(tmp_path / name, shade) for shade, name in enumerate(names)}
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    order = ("frame-1.webp", "frame-2.png", "frame-10.jpg", "frame-11.JPEG")
    assert list(read_pictures(tmp_path, 4)) == [written[name] for name in order]


def test_names_with_and_without_numbers_can_be_sorted(tmp_path):
    written = [write_picture(tmp_path / name, shade) for shade, name in enumerate(("1a.png", "a.png", "a1b2.png"))]
    assert sorted(read_pictures(tmp_path, 3)) == sorted(written)


def test_a_video_gives_the_middle_of_each_part(tmp_path):
    shades = list(range(20, 200, 10))
    write_video(tmp_path / "movie.mp4", shades)
    pictures = [np.asarray(Image.open(io.BytesIO(png))) for png in read_pictures(tmp_path / "movie.mp4", 6)]
    assert all(picture.shape == (48, 64, 3) for picture in pictures)
    means = [picture.mean() for picture in pictures]
    assert means == pytest.approx(shades[1::3], abs=4), "18 frames in 6 parts of 3: the second of each"
    assert len(list(read_pictures(tmp_path / "movie.mp4", 18))) == 18


def test_a_video_that_is_too_short(tmp_path):
    write_video(tmp_path / "movie.mp4", [1, 2, 3])
    with pytest.raises(PictureError, match=r"movie.mp4 has 3 frames, and the story has 4"):
        list(read_pictures(tmp_path / "movie.mp4", 4))


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(PictureError, match="no folder and no video at .*nowhere"):
        list(read_pictures(tmp_path / "nowhere", 1))
    with pytest.raises(PictureError, match=r"holds no picture: expected files that end in .jpg, .jpeg, .png, .webp"):
        list(read_pictures(tmp_path, 1))
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(PictureError, match=r"holds 1 pictures, and the story has 2 frames"):
        list(read_pictures(tmp_path, 2))
    for broken in (b"no picture", whole[: len(whole) // 2]):
        (tmp_path / "a.jpg").write_bytes(broken)
        with pytest.raises(PictureError, match=r"a.jpg: cannot be read as a picture"):
            list(read_pictures(tmp_path, 1))
    with pytest.raises(PictureError, match="expected a folder of pictures or a video"):
        list(read_pictures(tmp_path / "a.jpg", 1))


def test_digits_that_are_no_decimals_are_letters_of_a_name(tmp_path):
    written = [write_picture(tmp_path / name, shade) for shade, name in enumerate(("1\u00b22.png", "3.png"))]
    assert list(read_pictures(tmp_path, 2)) == written


def test_a_folder_with_the_name_of_a_picture_is_none(tmp_path):
    (tmp_path / "b.png").mkdir()
    with pytest.raises(PictureError, match="holds no picture"):
        list(read_pictures(tmp_path, 1))
    written = write_picture(tmp_path / "a.png", 1)
    assert list(read_pictures(tmp_path, 1)) == [written]
    with pytest.raises(PictureError, match="holds 1 pictures, and the story has 2 frames"):
        list(read_pictures(tmp_path, 2))


@pytest.mark.parametrize("sides", [(8192, 4321), (10_000, 10_000), (60_000, 60_000)])
def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, sides):
    """Sides beyond our limit, beyond the one that Pillow warns of, and beyond the one that it raises at."""
    header = struct.pack(">4sIIBBBBB", b"IHDR", *sides, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header) - 4) + header + struct.pack(">I", zlib.crc32(header))
    data = struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + data)
    with pytest.raises(PictureError, match=r"bomb.png: more than 35,389,440 pixels .*: scale the picture down"):
        list(read_pictures(tmp_path, 1))


def test_pictures_come_one_by_one(tmp_path):
    first = write_picture(tmp_path / "1.png", 1)
    (tmp_path / "2.png").write_bytes(b"no picture")
    pictures = read_pictures(tmp_path, 2)
    assert next(pictures) == first
    with pytest.raises(PictureError, match=r"2.png: cannot be read as a picture"):
        next(pictures)
