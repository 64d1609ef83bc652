import numpy as np
import pytest
import torch

from models.aesthetic import Aesthetic
from models.metrics import normalize
from models.weights import WeightsError, folder, pull
from tests.tiny_checkpoints import save_aesthetic

NAME = "sac+logos+ava1-l14-linearMSE.pth"


def draw_embeddings(count: int, width: int = 16) -> np.ndarray:
    return normalize(np.random.default_rng(0).normal(size=(count, width))).astype(np.float32)


def test_the_rating_is_the_product_of_the_layers(tmp_path):
    state = save_aesthetic(tmp_path / NAME)
    pull(["aesthetic_l14"], tmp_path / "weights", print, tmp_path)
    embeddings = draw_embeddings(5)
    expected = embeddings.astype(np.float64)
    for number in (0, 2, 4, 6, 7):
        weight, bias = (state[f"layers.{number}.{part}"].double().numpy() for part in ("weight", "bias"))
        expected = expected @ weight.T + bias
    for place in (tmp_path / NAME, folder("aesthetic_l14", tmp_path / "weights")):
        found = Aesthetic(place)(embeddings)
        assert found.shape == (5,) and found.dtype == np.float32 and np.ptp(found) > 0.01
        np.testing.assert_allclose(found, expected[:, 0], rtol=1e-4, atol=1e-4)


def test_the_papers_width_is_read_from_the_file(tmp_path):
    save_aesthetic(tmp_path / NAME, 768)
    assert Aesthetic(tmp_path / NAME).width == 768


def test_embeddings_of_another_clip_are_refused(tmp_path):
    save_aesthetic(tmp_path / NAME, 768)
    with pytest.raises(WeightsError, match=r"takes CLIP embeddings of 768 numbers, and CLIP gives 16: set .*clip_vit"):
        Aesthetic(tmp_path / NAME)(draw_embeddings(2))


@pytest.mark.parametrize("broken", ["first", "shape"])
def test_a_file_that_is_something_else_is_named(tmp_path, broken):
    state = save_aesthetic(tmp_path / NAME)
    if broken == "first":
        del state["layers.0.weight"]
    else:
        state["layers.7.weight"] = torch.zeros(2, 16)
    torch.save(state, tmp_path / NAME)
    with pytest.raises(WeightsError, match="is not an aesthetic predictor"):
        Aesthetic(tmp_path / NAME)
