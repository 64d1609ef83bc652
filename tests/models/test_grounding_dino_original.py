"""Grounding DINO by its authors' code, on a checkpoint in its authors' layout with random weights and few layers.

Runs where `moviedreamer[groundingdino]` is installed, which needs a torchvision that fits torch.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from models.grounding_dino_original import GroundingDinoOriginal, TextEncoder
from models.weights import WeightsError

pytest.importorskip("torchvision", reason="its wheel in the package index is linked to CUDA", exc_type=ImportError)
pytest.importorskip("groundingdino", reason="needs torchvision")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # of code that is not ours
]

SETTINGS = """
batch_size = 1
modelname = "groundingdino"
backbone = "swin_T_224_1k"
position_embedding = "sine"
pe_temperatureH = 20
pe_temperatureW = 20
return_interm_indices = [1, 2, 3]
backbone_freeze_keywords = None
enc_layers = 1
dec_layers = 2
pre_norm = False
dim_feedforward = 64
hidden_dim = 256
dropout = 0.0
nheads = 8
num_queries = 30
query_dim = 4
num_patterns = 0
num_feature_levels = 4
enc_n_points = 4
dec_n_points = 4
two_stage_type = "standard"
two_stage_bbox_embed_share = False
two_stage_class_embed_share = False
transformer_activation = "relu"
dec_pred_bbox_embed_share = True
dn_box_noise_scale = 1.0
dn_label_noise_ratio = 0.5
dn_label_coef = 1.0
dn_bbox_coef = 1.0
embed_init_tgt = True
dn_labelbook_size = 2000
max_text_len = 256
text_encoder_type = "bert-base-uncased"
use_text_enhancer = True
use_fusion_layer = True
use_checkpoint = False
use_transformer_ckpt = False
use_text_cross_attention = True
text_dropout = 0.0
fusion_dropout = 0.0
fusion_droppath = 0.1
sub_sentence_present = True
"""


def save_original(folder: Path) -> Path:
    """The files of a release: settings, the checkpoint under "model" with a prefix, and beside them BERT's folder."""
    from groundingdino.models.GroundingDINO import groundingdino as package
    from groundingdino.util.slconfig import SLConfig

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "person", "a", "dog"]
    bert = folder / "bert-base-uncased"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(bert)
    transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(bert)
    (folder / "GroundingDINO_tiny.py").write_text(SETTINGS)
    settings = SLConfig.fromfile(str(folder / "GroundingDINO_tiny.py"))
    settings.device, settings.text_encoder_type = "cpu", str(bert)
    package.BertModelWarper = TextEncoder
    model = package.build_groundingdino(settings)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state}, folder / "groundingdino_tiny.pth")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_original(tmp_path_factory.mktemp("a release"))


def noise(height=90, width=160):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_it_gives_boxes_in_the_pixels_of_the_picture_best_first(folder):
    detector = GroundingDinoOriginal(folder, "Person", "cpu")
    found = detector.detect(noise(), 0.0)
    assert len(found.scores) > 0 and found.boxes.shape == (len(found.scores), 4)
    assert (found.boxes >= 0).all() and (found.boxes[:, 2] <= 160).all() and (found.boxes[:, 3] <= 90).all()
    assert (np.diff(found.scores) <= 0).all()
    assert len(detector.detect(noise(), 1.01).scores) == 0
    np.testing.assert_array_equal(detector.detect(noise(), 0.0).boxes, found.boxes)


def test_the_prompt_is_read(folder):
    person, dog = (GroundingDinoOriginal(folder, prompt, "cpu").detect(noise(), 0.0) for prompt in ("person", "a dog"))
    assert person.scores.shape != dog.scores.shape or not np.allclose(person.scores, dog.scores)


def test_a_checkpoint_that_lacks_a_weight_is_named(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    state = torch.load(folder / "groundingdino_tiny.pth", weights_only=True)
    del state["model"]["module.transformer.level_embed"]
    (tmp_path / "groundingdino_tiny.pth").unlink()
    torch.save(state, tmp_path / "groundingdino_tiny.pth")
    with pytest.raises(WeightsError, match=r"tiny.pth lacks transformer.level_embed, which GroundingDINO_tiny.py asks"):
        GroundingDinoOriginal(tmp_path, "person", "cpu")
