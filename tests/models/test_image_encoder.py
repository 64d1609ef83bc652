import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import CLIPVisionModel

from models import weights
from models.image_encoder import MEAN, STD, ClipPatches, DinoV2, load_dinov2, open_image_encoder
from models.weights import WeightsError
from tests.tiny_checkpoints import save_clip


@pytest.fixture(scope="module")
def encoder() -> DinoV2:
    return DinoV2()


def test_the_whole_backbone_answers_as_the_onnx_export_does(tmp_path):
    path = weights.file("dinov2_small")
    graph = onnx.load(path)
    (norm,) = [n for n in graph.graph.node if n.name.startswith("/backbone/layernorm/Add_1")]
    graph.graph.output.append(onnx.ValueInfoProto(name=norm.output[0]))
    onnx.save(graph, tmp_path / "open.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "open.onnx", providers=["CPUExecutionProvider"])
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    image = (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    (expected,) = session.run([norm.output[0]], {"input_image": image.numpy()})
    with torch.no_grad():
        found = load_dinov2(path, layers=12)(image).last_hidden_state.numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_encode_gives_the_patch_tokens_after_the_eighth_layer(encoder):
    image = torch.rand(1, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    whole = load_dinov2(weights.file("dinov2_small"), layers=12)
    with torch.no_grad():
        states = whole((image - encoder.mean) / encoder.std, output_hidden_states=True).hidden_states
    assert torch.equal(encoder.encode(image), states[8][:, 1:])


def test_one_token_for_each_patch_of_14_pixels(encoder):
    assert encoder.encode(torch.rand(2, 3, 28, 70)).shape == (2, 2 * 5, 384)


def test_a_side_that_is_no_multiple_of_14_is_refused(encoder):
    with pytest.raises(ValueError, match="70x30"):
        encoder.encode(torch.rand(1, 3, 30, 70))


def test_the_encoder_stays_frozen(encoder):
    encoder.train()
    assert not encoder.backbone.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.encode(torch.rand(1, 3, 28, 28)).requires_grad


def test_clip_gives_the_patches_before_its_last_layer(tmp_path):
    encoder = ClipPatches(save_clip(tmp_path))
    whole = CLIPVisionModel.from_pretrained(tmp_path)
    image = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        states = whole((image - encoder.mean) / encoder.std, output_hidden_states=True).hidden_states
    assert (encoder.dim, encoder.patch_px, len(states)) == (32, 14, 3)
    assert torch.equal(encoder.encode(image), states[-2][:, 1:])
    assert encoder.encode(torch.rand(1, 3, 28, 56)).shape == (1, 2 * 4, 32)  # the table of positions is stretched


def test_an_encoder_is_opened_by_name_or_folder(tmp_path):
    assert isinstance(open_image_encoder("dinov2_small"), DinoV2)
    assert isinstance(open_image_encoder(str(save_clip(tmp_path / "clip"))), ClipPatches)
    with pytest.raises(WeightsError, match="no weights at /nowhere"):
        open_image_encoder("/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="no CLIP image encoder at"):
        open_image_encoder(str(tmp_path / "empty"))
