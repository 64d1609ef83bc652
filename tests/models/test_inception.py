"""FID's Inception-v3 on random weights in the upstream layout.

What is expected was computed once by torch-fidelity 0.4.0's own code from the same file and the same pictures.
"""

import hashlib

import numpy as np
import pytest
import torch

from models.inception import Inception, InceptionV3, load_inception, scale_picture
from models.weights import WeightsError, folder, pull
from tests.tiny_checkpoints import save_inception

LAYOUT = "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"
FEATURES = [[0.873929, 2.211783, 6.082046, 0.383343], [0.763077, 2.106965, 6.162268, 0.310108]]
FEATURE_MEANS = [3.243372, 3.261339]
LOGITS = [[-4.640306, -8.819384, -6.806059, -2.488198], [-4.856961, -9.039318, -6.791813, -2.462465]]
LOGIT_DEVIATIONS = [8.036293, 8.092417]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    save_inception(path)
    return path


def noise(height: int, width: int, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_names_and_shapes_are_those_of_upstreams_file():
    state = InceptionV3().state_dict()
    told = [f"{name} {tuple(v.shape)}" for name, v in sorted(state.items()) if not name.endswith("num_batches_tracked")]
    assert hashlib.sha256("\n".join(told).encode()).hexdigest() == LAYOUT
    assert sum(value.numel() for value in state.values()) == 23_885_486


def test_features_and_logits_equal_those_of_the_published_code(upstream, tmp_path):
    pull(["inception_fid"], tmp_path, print, upstream.parent)
    for place in (upstream, folder("inception_fid", tmp_path)):
        features, logits = Inception(place, "cpu")(list(noise(40, 60, 2)))
        assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
        np.testing.assert_allclose(features[:, :4], FEATURES, atol=1e-4)
        np.testing.assert_allclose(features.mean(axis=1), FEATURE_MEANS, atol=1e-4)
        np.testing.assert_allclose(logits[:, :4], LOGITS, atol=1e-4)
        np.testing.assert_allclose(logits.std(axis=1, ddof=1), LOGIT_DEVIATIONS, atol=1e-4)


def test_a_file_of_a_torch_that_kept_no_counts_is_read(upstream, tmp_path):
    state = torch.load(upstream, weights_only=True)
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]
    assert state._metadata, "what torch notes beside the tensors says that they are there"
    torch.save(state, tmp_path / "old.pth")
    assert torch.equal(load_inception(tmp_path / "old.pth").fc.bias, state["fc.bias"])


def test_pictures_of_several_sizes_are_looked_at_together(upstream):
    inception = Inception(upstream, "cpu")
    first, second = noise(40, 60, 1)[0], noise(30, 20, 1)[0]
    together, alone = inception([first, second])[0], inception([second])[0]
    np.testing.assert_allclose(together[1], alone[0], atol=1e-4)


def test_scaling_puts_pixel_0_on_pixel_0_and_keeps_what_has_the_size():
    same = torch.from_numpy(noise(299, 299, 1)[0])
    torch.testing.assert_close(scale_picture(same), same.permute(2, 0, 1).float())
    ramp = torch.arange(0, 240, 60, dtype=torch.uint8).view(1, 4, 1).expand(1, 4, 3)
    row = scale_picture(ramp)[0, 0]
    assert row[0] == 0 and row[75] == pytest.approx(75 * 4 / 299 * 60, abs=1e-3)
    assert row[225:].tolist() == [180.0] * 74, "beyond the last pixel's place there is nothing to blend with"


def test_a_file_that_is_something_else_is_named(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x.pth is not FID's Inception-v3"):
        Inception(tmp_path / "x.pth")
    torch.save([torch.zeros(2)], tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="something else than named tensors"):
        Inception(tmp_path)
    (tmp_path / "y.pth").write_bytes(b"no pickle")
    with pytest.raises(WeightsError, match=r"y.pth cannot be read as FID's Inception-v3"):
        Inception(tmp_path / "y.pth")
    with pytest.raises(WeightsError, match="holds 2 files of tensors: expected one"):
        Inception(tmp_path)
