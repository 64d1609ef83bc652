import io
import json
import shutil
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from safetensors.torch import load_file, save_file

from models import weights
from models.aesthetic import Aesthetic
from models.clip import Clip
from models.face_detector import CenterFace
from models.face_embedder import DlibFace, align_face
from models.metrics import frechet_distance, measure_moments
from stages.errors import ComputationError
from stages.evaluate import SPEC, Evaluate, EvaluateConfig, FilmFaces, cover, find_expected
from stages.spec import no_progress
from tests.tiny_checkpoints import save_aesthetic, save_clip, save_inception

# webdataset leaves closing the tars it opened to the garbage collector.

CONFIG = EvaluateConfig(height_px=70, width_px=84, batch=3)
SCRIPT = json.dumps({"characters": [{"identity": "Person 1", "character_index": 0}]})
EMPTY = json.dumps({"characters": []})


def encode_jpeg(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


@pytest.fixture(scope="module")
def portraits() -> list[bytes]:
    """Pictures of one man in a car."""
    with av.open(str(weights.folder("demo_films") / "carphone_pristine.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    return [encode_jpeg(frame) for frame in frames[:60:10]]


@pytest.fixture(scope="module")
def streets() -> list[bytes]:
    """Pictures without a face."""
    with av.open(str(weights.folder("demo_films") / "bigbuckbunny.mp4")) as film:
        frames = [frame.to_ndarray(width=256, height=144, format="rgb24") for frame in film.decode(video=0)]
    return [encode_jpeg(frame) for frame in frames[:60:10]]


@pytest.fixture(scope="module")
def identities(portraits: list[bytes]) -> np.ndarray:
    detector, embedder = CenterFace(), DlibFace()
    images = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) for jpeg in portraits]
    return embedder.embed([align_face(image, detector.detect(image, 0.5).landmarks[0]) for image in images])


@pytest.fixture(scope="module")
def stage() -> Evaluate:
    """One stage for all tests: it loads each model once."""
    return Evaluate(CONFIG)


def conditioning(count: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(count, 8)).astype(np.float32)


def dump(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def write_shard(path: Path, jpegs: list[bytes], identities: np.ndarray | None = None) -> Path:
    with path.open("wb") as stream, webdataset.TarWriter(stream, mtime=0.0) as tar:
        for index, jpeg in enumerate(jpegs):
            known = identities is not None
            about = {
                "film_id": "carphone",
                "frame_index": index,
                "faces": [{"character_index": 0}, {"character_index": None}] if known else [],
            }
            rows = np.concatenate([conditioning(len(jpegs))[[index]], -np.ones((1, 8), np.float32)])
            names = np.concatenate([identities[[index]], np.ones((1, 128), np.float32)]) if known else rows[:0]
            sample = {"__key__": f"carphone-{index:08d}", "jpg": jpeg, "json": json.dumps(about).encode()}
            tar.write({**sample, "faces.npy": dump(rows if known else rows[:0]), "identities.npy": dump(names)})
    return path


def write_table(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_pictures(folder: Path, jpegs: list[bytes], scripts: list[str] | None = None) -> Path:
    scripts = scripts or [SCRIPT] * len(jpegs)
    rows = [{"frame_index": i, "script": s, "jpeg": j} for i, (s, j) in enumerate(zip(scripts, jpegs, strict=True))]
    return write_table(folder / "pictures.parquet", rows)


def write_dream(folder: Path, faces: list[list[float]]) -> Path:
    rows = [{"frame_index": i, "face_embeddings": face} for i, face in enumerate(faces)]
    schema = pa.schema([("frame_index", pa.int64()), ("face_embeddings", pa.list_(pa.float32()))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "dream.parquet")
    return folder / "dream.parquet"


def evaluate(stage: Evaluate, tmp_path: Path, progress=no_progress, **inputs: Path) -> dict[str, dict]:
    roles = {role: [path] for role, path in inputs.items()}
    summary = stage(roles, tmp_path, tmp_path, progress)
    numbers = {number["name"]: number for number in json.loads((tmp_path / "evaluation.json").read_text())}
    assert summary == {name: number["value"] for name, number in numbers.items()}
    return numbers


def test_without_inputs_every_number_is_null_and_says_why(stage, tmp_path):
    numbers = evaluate(stage, tmp_path)
    for number in numbers.values():
        assert set(number) == {"name", "value", "unit", "definition", "computed_with", "better"}
        assert number["value"] is None and number["definition"] and number["computed_with"]
        assert number["better"] in ("higher", "lower", None)
    for name, needed in (
        ("CLIP score", "CLIP"),
        ("FID", "Inception"),
        ("IS", "Inception"),
        ("aesthetic score", "CLIP"),
        ("ST", "CLIP"),
        ("CLIP-sim", "CLIP"),
    ):
        assert numbers[name]["computed_with"].startswith(f"not available in this profile: needs {needed}")


@pytest.fixture(scope="module")
def own_weights(tmp_path_factory) -> dict[str, str]:
    """The paper's models in their published layouts: CLIP tiny, and a predictor of its width."""
    folder = tmp_path_factory.mktemp("weights")
    save_clip(folder / "clip")
    save_inception(folder / "weights-inception-2015-12-05-6726825d.pth")
    save_aesthetic(folder / "sac+logos+ava1-l14-linearMSE.pth")
    places = ("clip", "weights-inception-2015-12-05-6726825d.pth", "sac+logos+ava1-l14-linearMSE.pth")
    return {name: str(folder / place) for name, place in zip(("clip", "inception", "aesthetic"), places, strict=True)}


def test_the_papers_numbers_are_computed_with_the_papers_models(tmp_path, own_weights, portraits, streets):
    stage = Evaluate(CONFIG.model_copy(update=own_weights))
    images = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) for jpeg in portraits]
    clip = Clip(Path(own_weights["clip"]))
    embedded, texts = clip.embed_pictures(images), [f"{letter} looks." for letter in "abcdefghijklmnop"]
    fits = embedded @ clip.embed_texts(texts).T
    scripts = [json.dumps(json.loads(SCRIPT) | {"plot": [texts[best]]}) for best in fits.argmax(axis=1)]
    numbers = evaluate(
        stage,
        tmp_path,
        shards=write_shard(tmp_path / "shard.tar", streets[:3]),
        pictures=write_pictures(tmp_path, portraits, scripts),
    )
    cosines = (embedded[1:] * embedded[:-1]).sum(axis=1)
    assert numbers["CLIP-sim"]["value"] == numbers["ST"]["value"] == pytest.approx(cosines.mean(), abs=1e-4)
    assert numbers["CLIP score"]["value"] == pytest.approx(100 * fits.max(axis=1).mean(), abs=1e-2) and fits.max() > 0.1
    ratings = Aesthetic(Path(own_weights["aesthetic"]))(embedded)
    assert numbers["aesthetic score"]["value"] == pytest.approx(ratings.mean(), abs=1e-3)
    assert numbers["FID"]["value"] > 1
    told = numbers["FID"]["computed_with"]
    assert "3 keyframes of the films, 6 generated pictures; fewer samples than the 2048 features" in told
    assert "at least 20" in numbers["IS"]["computed_with"]
    assert not any(str(tmp_path.parent) in number["computed_with"] for number in numbers.values())


def test_damaged_weights_give_no_numbers(tmp_path, own_weights, portraits):
    folder = shutil.copytree(own_weights["clip"], tmp_path / "damaged")
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"][0] = torch.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    stage = Evaluate(CONFIG.model_copy(update={"clip": str(folder)}))
    with pytest.raises(ComputationError, match="not finite .* the pictures or the weights are damaged"):
        evaluate(stage, tmp_path, pictures=write_pictures(tmp_path, portraits))


def test_weights_enter_the_recipe_by_what_they_hold(own_weights, tmp_path):
    config = CONFIG.model_copy(update=own_weights)
    assert not {"clip", "inception", "aesthetic"} & config.recipe().keys()
    assert set(own_weights.values()) <= set(config.weights()) and config.is_heavy() and not CONFIG.is_heavy()
    assert CONFIG.model_copy(update={"clip": "clip_vit_l14"}).recipe()["clip"] == "clip_vit_l14"
    assert "clip" not in CONFIG.recipe() and CONFIG.weights() == ("dinov2_small", "centerface", "dlib_face")


def test_an_aesthetic_predictor_without_clip_is_refused():
    with pytest.raises(ValueError, match="aesthetic=aesthetic_l14 rates CLIP embeddings: set clip too"):
        EvaluateConfig(aesthetic="aesthetic_l14")


def test_the_right_face_is_found_and_a_missing_one_is_not(stage, tmp_path, portraits, streets, identities):
    faces = conditioning(len(portraits)).tolist()
    numbers = evaluate(
        stage,
        tmp_path,
        shards=write_shard(tmp_path / "shard.tar", portraits, identities),
        pictures=write_pictures(tmp_path, [portraits[0], portraits[3], streets[0], streets[1]]),
        dream=write_dream(tmp_path, [faces[0], faces[1], faces[2], []]),
    )
    assert numbers["LT"]["value"] == pytest.approx(2 / 3)
    assert numbers["LT"]["computed_with"].startswith("2 of 3 pairs")


def test_another_persons_face_does_not_count(stage, tmp_path, portraits, identities):
    numbers = evaluate(
        stage,
        tmp_path,
        shards=write_shard(tmp_path / "shard.tar", portraits, identities + 0.1),  # 0.1 * sqrt(128) = 1.1 away
        pictures=write_pictures(tmp_path, portraits[:2]),
        dream=write_dream(tmp_path, conditioning(6)[:2].tolist()),
    )
    assert numbers["LT"]["value"] == 0


@pytest.mark.parametrize(
    ("faces", "reason"),
    [([[], []], "carry no face"), ([[1.0] * 8, []], "that the ingested films know")],
    ids=["no face", "unknown face"],
)
def test_lt_without_a_known_face_is_null(stage, tmp_path, portraits, identities, faces, reason):
    numbers = evaluate(
        stage,
        tmp_path,
        shards=write_shard(tmp_path / "shard.tar", portraits, identities),
        pictures=write_pictures(tmp_path, portraits[:2]),
        dream=write_dream(tmp_path, faces),
    )
    assert numbers["LT"]["value"] is None and reason in numbers["LT"]["computed_with"]


def test_st_looks_at_pairs_that_share_a_character(stage, tmp_path, portraits, streets):
    jpegs = [portraits[0], portraits[0], streets[0], portraits[1]]
    numbers = evaluate(stage, tmp_path, pictures=write_pictures(tmp_path, jpegs, [SCRIPT, SCRIPT, EMPTY, SCRIPT]))
    assert numbers["ST (DINOv2)"]["value"] == pytest.approx(1, abs=1e-5)
    assert numbers["ST (DINOv2)"]["computed_with"].endswith("1 pairs of frames")
    assert 0 < numbers["DINO-sim"]["value"] < 0.95
    assert numbers["FD-DINOv2"]["value"] is None


def test_a_single_picture_has_no_neighbour(stage, tmp_path, portraits):
    numbers = evaluate(stage, tmp_path, pictures=write_pictures(tmp_path, portraits[:1]))
    assert "two adjacent frames" in numbers["ST (DINOv2)"]["computed_with"]
    assert "at least 2" in numbers["DINO-sim"]["computed_with"]


def test_frechet_distance_tells_a_film_from_another(stage, tmp_path, portraits, streets):
    shard = write_shard(tmp_path / "shard.tar", portraits)
    same, other = (
        evaluate(stage, tmp_path, shards=shard, pictures=write_pictures(tmp_path, jpegs))
        for jpegs in (portraits, streets)
    )
    assert same["FD-DINOv2"]["value"] == pytest.approx(0, abs=1e-4)
    assert other["FD-DINOv2"]["value"] > 5 * other["FD-DINOv2 of the films with themselves"]["value"] > 0
    assert "6 keyframes of the films, 6 generated pictures" in other["FD-DINOv2"]["computed_with"]
    assert "biased" in other["FD-DINOv2"]["computed_with"]


def test_keyframes_are_taken_evenly_up_to_the_limit(tmp_path, portraits):
    stage = Evaluate(CONFIG.model_copy(update={"real_keyframes": 3}))
    calls = []
    shard = write_shard(tmp_path / "shard.tar", portraits[:5])
    numbers = evaluate(stage, tmp_path, lambda *call: calls.append(call), shards=shard)
    assert "2 even keyframes, 1 odd keyframes" in numbers["FD-DINOv2 of the films with themselves"]["computed_with"]
    assert calls[-1][:2] == (3, 3)


def test_features_enter_the_distance_as_they_are(stage, tmp_path, portraits, streets):
    images = [
        [cv2.imdecode(np.frombuffer(j, np.uint8), cv2.IMREAD_COLOR_RGB) for j in js] for js in (portraits, streets)
    ]
    features = [measure_moments(stage._features(group)) for group in images]
    shard = write_shard(tmp_path / "shard.tar", portraits)
    numbers = evaluate(stage, tmp_path, shards=shard, pictures=write_pictures(tmp_path, streets))
    assert numbers["FD-DINOv2"]["value"] == pytest.approx(frechet_distance(*features[0], *features[1]), rel=1e-3)


def test_training_metrics_are_taken_over(stage, tmp_path):
    for name, metrics in (
        ("autoencoder", {"retrieval_top1": 0.9, "keyframes": 40, "retrieval_definition": "an encoder"}),
        (
            "autoregressive",
            {"nll": -1.5, "nll_scripts_shuffled": -1.2, "nll_gaussian_full": None, "measured_frames": 4},
        ),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    numbers = evaluate(
        stage,
        tmp_path,
        autoencoder=tmp_path / "autoencoder" / "metrics.json",
        autoregressive=tmp_path / "autoregressive" / "metrics.json",
    )
    assert numbers["reconstruction retrieval, top 1"]["value"] == 0.9
    assert numbers["reconstruction retrieval, top 1"]["computed_with"] == "40 keyframes; an encoder"
    assert (numbers["held-out NLL"]["value"], numbers["held-out NLL, scripts shuffled"]["value"]) == (-1.5, -1.2)
    assert numbers["held-out NLL, one Gaussian"]["computed_with"] == "no held-out keyframes"


def test_a_broken_picture_is_named(stage, tmp_path):
    with pytest.raises(ComputationError, match="generated picture of 4 bytes"):
        evaluate(stage, tmp_path, pictures=write_pictures(tmp_path, [b"oops"]))


def test_faces_of_the_story_are_recognised_by_their_conditioning():
    faces = FilmFaces([("a", 0), ("b", 0), ("b", 1)], np.eye(3, 4, dtype=np.float32), np.zeros((3, 2)))
    near, between = np.eye(4)[2] + 0.05, np.ones(4)
    dream = [
        {"frame_index": 0, "face_embeddings": np.concatenate([np.eye(4)[0], near]).tolist()},
        {"frame_index": 1, "face_embeddings": between.tolist()},
    ]
    assert find_expected(dream, faces) == {0: {("a", 0), ("b", 1)}}


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (18, 18), (300, 302)])
def test_cover_keeps_the_middle(size):
    image = np.zeros((*size, 3), np.uint8)
    height, width = (side // 6 for side in size)
    image[size[0] // 2 - height : size[0] // 2 + height, size[1] // 2 - width : size[1] // 2 + width] = 255
    found = cover(image, 42, 28)
    assert found.shape == (28, 42, 3) and found[13:15, 20:22].min() > 250 and found[0, 0].max() < 5


def test_sides_that_the_encoder_cannot_take_are_refused():
    with pytest.raises(ValueError, match="multiple of 14"):
        EvaluateConfig(height_px=100)


def test_spec_loads_the_stage():
    assert SPEC.load() is Evaluate and set(CONFIG.weights()) <= weights.TABLE.keys()
