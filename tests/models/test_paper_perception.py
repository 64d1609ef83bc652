"""Grounding DINO, SAM 2, InsightFace and FaRL on tiny checkpoints in the published layouts."""

import numpy as np
import pytest
import torch

from models.face_embedder import align_face
from models.face_models import FaceModels
from models.farl import Farl, load_farl
from models.grounding_dino import GroundingDino, normalise_prompt, read_boxes
from models.grounding_dino_original import GroundingDinoOriginal, prepare_picture
from models.insight_face import InsightFace
from models.sam2 import Sam2
from models.weights import WeightsError
from tests.tiny_checkpoints import save_farl, save_grounding_dino, save_insightface, save_sam2

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(height: int = 90, width: int = 160, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_grounding_dino_gives_boxes_in_the_pixels_of_the_picture(tmp_path):
    detector = GroundingDino(save_grounding_dino(tmp_path), "Person", "cpu")
    found = detector.detect(noise(), 0.0)
    assert found.boxes.shape == (len(found.scores), 4) and len(found.scores) > 0
    assert (found.boxes >= 0).all() and (found.boxes[:, 2] <= 160).all() and (found.boxes[:, 3] <= 90).all()
    assert (np.diff(found.scores) <= 0).all()
    assert len(detector.detect(noise(), 1.01).scores) == 0
    wide, tall = detector.detect(noise(40, 300), 0.0), detector.detect(noise(300, 40), 0.0)
    assert wide.boxes[:, 2].max() > 60 and tall.boxes[:, 3].max() > 60


def test_a_prompt_is_written_as_the_model_was_trained():
    assert normalise_prompt(" Person ") == normalise_prompt("person.") == "person."


def test_what_is_found_twice_counts_once():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.41, 0.4], [0.2, 0.2, 0.1, 0.1], [0.9, 0.9, 0.4, 0.4]])
    found = read_boxes(boxes, torch.tensor([0.6, 0.7, 0.5, 0.2]), (100, 200), 0.4)
    np.testing.assert_allclose(found.scores, [0.7, 0.5])
    np.testing.assert_allclose(found.boxes, [[59, 30, 141, 70], [30, 15, 50, 25]], atol=1e-4)


def test_the_original_code_that_is_not_installed_is_named_with_the_remedy(tmp_path):
    with pytest.raises(WeightsError, match=r"install `moviedreamer\[groundingdino\]`|lacks the .pth checkpoint"):
        GroundingDinoOriginal(tmp_path, "person", "cpu")


@pytest.mark.parametrize(
    ("shape", "expected"), [((90, 160), (3, 750, 1333)), ((400, 400), (3, 800, 800)), ((1000, 200), (3, 1333, 267))]
)
def test_the_original_code_reads_pictures_at_its_size(shape, expected):
    assert prepare_picture(noise(*shape)).shape == expected


def test_sam2_masks_each_box_at_its_size(tmp_path):
    boxes = np.float32([[3.5, 4.2, 50, 80], [100, 10, 160, 90]])
    model = Sam2(save_sam2(tmp_path), "cpu")
    masks = model.segment(noise(), boxes)
    assert [(mask.shape, mask.dtype) for mask in masks] == [((76, 47), np.uint8), ((80, 60), np.uint8)]
    (alone,) = model.segment(noise(), boxes[1:])
    assert np.abs(alone.astype(int) - masks[1]).max() <= 1, "a mask depends on its own box alone"
    assert not np.array_equal(model.segment(noise(seed=1), boxes)[0], masks[0])


@pytest.fixture(scope="module")
def insightface(tmp_path_factory):
    return save_insightface(tmp_path_factory.mktemp("a folder"))


def test_insightface_finds_bright_squares_and_their_landmarks(insightface):
    image = np.zeros((640, 640, 3), np.uint8)
    image[160:168, 320:328] = 255
    found = InsightFace(insightface).detect(image, 0.5)
    assert len(found) == 1 and found.scores[0] > 0.9
    np.testing.assert_allclose(found.boxes, [[304, 144, 336, 176]], atol=1)
    np.testing.assert_allclose(found.landmarks[0], [[312, 152], [328, 152], [320, 160], [312, 168], [328, 168]], atol=1)
    assert len(InsightFace(insightface).detect(np.zeros((640, 640, 3), np.uint8), 0.5)) == 0


def test_insightface_reads_red_as_red(insightface):
    """The libraries around it take blue first."""
    landmarks = np.float32([[[130, 130], [160, 130], [145, 145], [132, 160], [158, 160]]])
    red, blue = np.zeros((2, 300, 300, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    model = InsightFace(insightface)
    vectors = [model.embed(image, landmarks)[0] for image in (red, blue)]
    assert not np.allclose(*vectors)
    direct = model._recognition.get_feat([np.full((112, 112, 3), (0, 0, 255), np.uint8)])[0]
    np.testing.assert_allclose(vectors[0], direct / np.linalg.norm(direct), atol=1e-5)
    assert model.embed(red, landmarks[:0]).shape == (0, 512)


def test_insightface_without_its_models_is_named(tmp_path, insightface):
    with pytest.raises(WeightsError, match="no InsightFace models at .*expected a folder with .onnx files"):
        InsightFace(tmp_path)
    (tmp_path / "w600k.onnx").write_bytes((insightface / "w600k_tiny.onnx").read_bytes())
    with pytest.raises(WeightsError, match="holds no face detector"):
        InsightFace(tmp_path)
    (tmp_path / "w600k.onnx").unlink()
    (tmp_path / "det.onnx").write_bytes((insightface / "det_tiny.onnx").read_bytes())
    with pytest.raises(WeightsError, match="holds no ArcFace model"):
        InsightFace(tmp_path)


def test_farl_is_the_tower_of_its_file(tmp_path):
    tower = save_farl(tmp_path / "FaRL-Base-Patch16-LAIONFace20M-ep64.pth")
    model = load_farl(tmp_path / "FaRL-Base-Patch16-LAIONFace20M-ep64.pth")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(pixel_values=images).image_embeds, tower(images), atol=1e-4, rtol=1e-4)


def test_farl_describes_faces_by_vectors_of_length_one(tmp_path):
    save_farl(tmp_path / "farl.pth")
    model = Farl(tmp_path / "farl.pth", "cpu")
    vectors = model.embed([noise(150, 150), noise(150, 150, seed=1)])
    assert vectors.shape == (2, 24) == (2, model.width)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert model.embed([]).shape == (0, 24)


@pytest.mark.parametrize(
    "content", [{"state_dict": {"other.weight": torch.zeros(2)}}, {"visual.proj": torch.zeros(2, 2)}]
)
def test_a_file_that_is_not_farl_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x.pth is not a FaRL file"):
        load_farl(tmp_path / "x.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"state_dict": Evil()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x.pth is not a FaRL file: UnpicklingError"):
        load_farl(tmp_path / "x.pth")


def test_the_papers_choice_of_face_models_works_together(tmp_path, insightface):
    save_farl(tmp_path / "farl.pth")
    models = FaceModels("insightface", "farl", "arcface", str(insightface), str(tmp_path))
    image = np.zeros((640, 640, 3), np.uint8)
    image[160:168, 320:328] = 255
    found = models.detect(image, 0.5)
    chips = [align_face(image, points) for points in found.landmarks]
    assert models.describe(chips).shape == (1, 24)
    assert models.identify(image, found.landmarks, chips).shape == (1, 512)
    with pytest.raises(WeightsError, match="no weights at nowhere: expected a folder, or one of"):
        FaceModels("insightface", "farl", "arcface", "nowhere", str(tmp_path))
