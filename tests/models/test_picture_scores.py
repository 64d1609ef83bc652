"""Scores of pictures by what is put in: CLIP at tiny size, and functions where a test says what is seen."""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.clip import Clip
from models.measures import CLIP_SHORT_TERM
from models.metrics import clip_score, normalize
from models.picture_scores import Extractors, Features, describe_frame, measure_short_term, score_pictures
from tests.tiny_checkpoints import save_clip

NAMES = {"encode": "an encoder", "clip": "CLIP", "inception": "a classifier", "aesthetic": "a rater"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return Clip(save_clip(tmp_path_factory.mktemp("clip")), "cpu")


def draw_pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (24, 30 + number, 3), dtype=np.uint8) for number in range(count)]


def write_script(*names: str, plot: str = "Somebody walks.") -> str:
    return json.dumps({"characters": [{"identity": name} for name in names], "plot": [plot] if plot else []})


def encode(pictures) -> np.ndarray:
    return np.stack([picture.reshape(-1, 3).mean(axis=0) for picture in pictures]).astype(np.float32)


def classify(pictures) -> tuple[np.ndarray, np.ndarray]:
    """A network with two features and three labels."""
    weights = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    seen = np.stack([p.reshape(-1, 3).mean(axis=0) + p[:10].std() for p in pictures]).astype(np.float32) @ weights
    return seen[:, :2], seen[:, 2:]


def score(scripts, pictures, real=None, **looks) -> dict:
    extractors = Extractors(encode, NAMES, **looks)
    seen = real if real is not None else extractors.look([], 4, lambda count: None)
    numbers = score_pictures(iter(pictures), scripts, extractors, seen, 4, lambda count: None)
    assert len({number.name for number in numbers}) == len(numbers) == 10
    return {number.name: number for number in numbers}


def test_every_number_is_there_with_a_definition_or_a_reason(clip):
    pictures = draw_pictures(20)
    extractors = Extractors(encode, NAMES, clip, classify, lambda embeddings: embeddings.sum(axis=1))
    real = extractors.look(draw_pictures(9, seed=1), 4, lambda count: None, with_clip=False)
    assert real.clip is None and real.inception.shape == (9, 2)
    found = score(
        [write_script("A")] * 20, pictures, real, clip=clip, inception=classify, aesthetic=extractors.aesthetic
    )
    assert all(number.value is not None and number.definition for number in found.values())
    assert 0 <= found["CLIP score"].value <= 100
    assert found["FID"].value >= 0 and "9 keyframes of the films, 20 generated pictures" in found["FID"].computed_with
    assert 1 <= found["IS"].value <= 3 and "20 pictures in 10 splits" in found["IS"].computed_with
    assert found["aesthetic score"].value == pytest.approx(clip.embed_pictures(pictures).sum(axis=1).mean(), abs=1e-4)
    assert found["ST"].value == pytest.approx(found["CLIP-sim"].value), "all frames share a character"


def test_what_is_not_injected_is_null_and_says_what_it_needs(clip):
    alone = score([write_script("A")] * 3, draw_pictures(3))
    for name, needs in (("CLIP score", "CLIP"), ("ST", "CLIP"), ("CLIP-sim", "CLIP"), ("FID", "Inception-v3"),
                        ("IS", "Inception-v3"), ("aesthetic score", "CLIP and aesthetic predictor")):  # fmt: skip
        assert alone[name].value is None
        assert alone[name].computed_with == f"not available in this profile: needs {needs} weights"
    assert alone["ST (DINOv2)"].value is not None
    rated = score([write_script("A")] * 3, draw_pictures(3), clip=clip)["aesthetic score"]
    assert rated.computed_with == "not available in this profile: needs aesthetic predictor weights"


def test_without_pictures_every_number_is_null(clip):
    found = score(None, [], clip=clip, inception=classify, aesthetic=lambda embeddings: embeddings.sum(axis=1))
    assert all(number.value is None and number.computed_with for number in found.values())


def test_few_pictures_are_named_where_they_bias(clip):
    pictures = draw_pictures(3)
    extractors = Extractors(encode, NAMES, inception=lambda some: (np.ones((len(some), 2048)), classify(some)[1]))
    real = extractors.look(pictures, 4, lambda count: None)
    found = score([write_script()] * 3, pictures, real, inception=extractors.inception)
    assert (
        found["FID"].value == pytest.approx(0) and "fewer samples than the 2048 features" in found["FID"].computed_with
    )
    assert "biased" in found["FID"].computed_with
    assert found["IS"].value is None and "3 generated pictures: 10 splits need" in found["IS"].computed_with


def test_a_picture_without_a_script_is_refused():
    with pytest.raises(ValueError, match="3 pictures and 2 scripts"):
        score([write_script()] * 2, draw_pictures(3))


def test_st_takes_adjacent_pairs_that_share_a_character():
    vectors = np.array([[1.0, 0], [1, 0], [0, 1], [1, 1], [1, 0]])
    told = [json.loads(write_script(*names)) for names in ("AB", "B", "A", "CA", "D")]
    found = measure_short_term(CLIP_SHORT_TERM, told, vectors, "CLIP")
    assert found.value == pytest.approx((1 + np.sqrt(0.5)) / 2), "pairs 0-1 and 2-3; 1-2 and 3-4 share nobody"
    assert found.computed_with == "CLIP; 2 pairs of frames"
    assert measure_short_term(CLIP_SHORT_TERM, told[1:3], vectors[1:3], "CLIP").value is None


def test_the_text_of_a_frame_begins_with_its_plot():
    script = {
        "characters": [{"identity": "A", "description": ["A waves.", "A is tall."]}, {"identity": "B"}],
        "scene_elements": ["It rains."],
        "plot": ["They meet."],
    }
    assert describe_frame(script) == "They meet. A waves. A is tall. It rains."
    assert describe_frame({"characters": []}) == ""


def test_long_texts_are_counted_and_frames_without_text_left_out(clip):
    scripts = [write_script(plot=text) for text in ("short", "x" * 77, "y" * 78, "")]
    found = score(scripts, draw_pictures(4), clip=clip)["CLIP score"]
    assert found.computed_with == "CLIP; 3 frames, 1 without text left out; 1 of 3 texts cut to what CLIP reads"
    silent = score([write_script(plot="")] * 2, draw_pictures(2), clip=clip)["CLIP score"]
    assert silent.value is None and "no frame has a script" in silent.computed_with


def test_clip_score_is_the_published_one(clip):
    """torchmetrics' own, with the same towers put into it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.multimodal.clip_score import CLIPScore

    class Towers(torch.nn.Module):
        config = clip._model.config

        def get_image_features(self, pixels):
            return clip._model.get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, words, mask):
            return clip._model.get_text_features(input_ids=words, attention_mask=mask).pooler_output

    def prepare(text=None, images=None, **rest):
        if text is not None:
            return clip._tokenizer(text, return_tensors="pt", padding=True)
        prepared = [clip._prepare(image.permute(1, 2, 0).numpy()) for image in images]
        return {"pixel_values": torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2)}

    pictures, choice = draw_pictures(6), [f"{letter} comes in" for letter in "abcdefghijkl"]
    fits = clip.embed_pictures(pictures) @ clip.embed_texts(choice).T
    texts = [choice[best] for best in fits.argmax(axis=1)]  # random towers: others would give a score of 0
    published = CLIPScore(model_name_or_path=lambda: (Towers(), prepare))
    with torch.inference_mode():
        published.update([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures], texts)
    found = score([write_script(plot=text) for text in texts], pictures, clip=clip)["CLIP score"].value
    assert 1 < found < 99 and found == pytest.approx(published.compute().item(), abs=1e-3)


@given(st.integers(0, 1000), st.integers(1, 9))
def test_clip_score_lies_between_0_and_100(seed, count):
    drawn = np.random.default_rng(seed).normal(size=(2, count, 4))
    assert 0 <= clip_score(drawn[0], drawn[1]) <= 100
    assert clip_score(drawn[0], 3 * drawn[0]) == pytest.approx(100)
    assert clip_score(drawn[0], -drawn[0]) == 0
    both = np.concatenate([drawn[0], -drawn[0]])
    assert clip_score(both, np.concatenate([drawn[0]] * 2)) == pytest.approx(0, abs=1e-9), (
        "the mean is bounded, not each"
    )
    assert normalize(drawn[0]).shape == drawn[0].shape


def test_clip_score_refuses_unequal_and_empty_sets():
    with pytest.raises(ValueError, match="2 pictures and 3 texts"):
        clip_score(np.eye(2), np.ones((3, 2)))
    with pytest.raises(ValueError, match="above 0"):
        clip_score(np.zeros((0, 2)), np.zeros((0, 2)))


def test_features_of_no_picture_are_empty():
    assert Extractors(encode, NAMES).look([], 4, lambda count: None).dino.shape == (0, 1)
    assert Features(np.zeros((0, 1))).clip is None
