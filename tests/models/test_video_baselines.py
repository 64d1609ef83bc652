"""The two videos: their keyframes are the frames that diffusers itself makes at the keyframes' times."""

import io
import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models import free_noise, svd_chain
from models.diffusers_pipelines import Sampling
from models.latents import write_jpeg
from models.picture_folder import PictureFolder
from tests.tiny_pipelines import write_motion_adapter, write_sd15_pipeline, write_svd_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLING = Sampling(steps=2, guidance=2.0, width_px=32, height_px=32, seed=3)


def read(pictures: PictureFolder, count: int) -> list[bytes]:
    return [pictures.read(frame) for frame in range(count)]


@given(st.integers(1, 40), st.floats(0.2, 5), st.integers(2, 25))
def test_keyframes_lie_at_their_times_in_the_chain(keyframes, seconds, clip_frames):
    places = svd_chain.place_keyframes(keyframes, seconds, clip_frames)
    frames = [place.clip * (clip_frames - 1) + place.offset for place in places]
    assert frames == [round(keyframe * seconds * svd_chain.FPS) for keyframe in range(keyframes)]
    assert frames == sorted(set(frames))
    assert all(0 < place.offset < clip_frames for place in places[1:])
    assert places[0] == svd_chain.Place(0, 0)


def test_each_clip_starts_from_the_last_frame_of_the_one_before(tmp_path):
    pipeline = svd_chain.load_svd(write_svd_pipeline(tmp_path / "svd", frames=3), "float32")
    first = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    stream = io.BytesIO()
    first.save(stream, "PNG")
    places = [svd_chain.Place(0, 0), svd_chain.Place(0, 2), svd_chain.Place(1, 1)]
    pictures = PictureFolder(tmp_path / "pictures", 95)
    svd_chain.chain_clips(pipeline, stream.getvalue(), places, SAMPLING, pictures, lambda *_: None)

    start, expected = first, []
    for clip, offsets in ((0, (0, 2)), (1, (1,))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            frames = pipeline(
                start, 32, 32, num_inference_steps=2, max_guidance_scale=2.0, generator=SAMPLING.generator(clip),
                decode_chunk_size=8, output_type="pt",
            ).frames[0]  # fmt: skip
        expected += [write_jpeg(frames[offset], 95) for offset in offsets]
        start = Image.fromarray((frames[-1] * 255).round().byte().permute(1, 2, 0).numpy())
    assert read(pictures, 3) == expected


@pytest.fixture(scope="module")
def animator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    sd15, motion = write_sd15_pipeline(folder / "sd"), write_motion_adapter(folder / "motion")
    return free_noise.load_free_noise(sd15, motion, "float32")


def paint(animator, folder, prompts, sampling=SAMPLING) -> list[bytes]:
    pictures = PictureFolder(folder, 95)
    free_noise.paint_video(animator, prompts, [0, 16][: len(prompts)], sampling, pictures, lambda *_: None)
    return read(pictures, len(prompts))


def test_pictures_are_frames_of_the_video_that_free_noise_makes(animator, tmp_path):
    made = paint(animator, tmp_path, ["a dog", "the sea"])
    animator.scheduler.done = 0
    frames = animator(
        {0: "a dog", 16: "the sea"}, num_frames=17, height=32, width=32, num_inference_steps=2, guidance_scale=2.0,
        generator=SAMPLING.generator(0), output_type="pt",
    ).frames[0]  # fmt: skip
    shown = [np.asarray(Image.open(io.BytesIO(jpeg)), np.float32) for jpeg in made]
    wanted = [np.asarray(Image.open(io.BytesIO(write_jpeg(frames[i], 95))), np.float32) for i in (0, 16)]
    for a, b in itertools.product(range(2), repeat=2):  # decoded one by one, so that the last bit may differ
        assert (np.abs(shown[a] - wanted[b]).mean() < 0.5) == (a == b)


def test_a_video_follows_its_prompts_and_its_seed(animator, tmp_path):
    made = paint(animator, tmp_path / "a", ["a dog"])
    assert paint(animator, tmp_path / "again", ["a dog"]) == made
    assert paint(animator, tmp_path / "b", ["the sea"]) != made
    assert paint(animator, tmp_path / "c", ["a dog"], replace(SAMPLING, seed=4)) != made
