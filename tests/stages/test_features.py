"""Features and latents of the keyframes of a shard, and what reads them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.feature_table import FeatureTable, FeatureTableError, FrozenModels
from models.latents import read_keyframes
from models.samples import read_samples
from stages.errors import ComputationError
from stages.features import SPEC, Features, FeaturesConfig
from stages.spec import no_progress
from tests.stages.tiny_shards import SMALL, write_features, write_shard
from tests.tiny_checkpoints import save_clip, save_sdxl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard(tmp_path_factory.mktemp("shards") / "shard-0.tar")


@pytest.fixture(scope="module")
def features(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_features([shard], tmp_path_factory.mktemp("features"))


def test_rows_are_what_the_frozen_models_say(shard: Path, features: list[Path]) -> None:
    table = FeatureTable([features[0].parent], "keyframes")
    pictures = read_keyframes((s["jpg"] for s in read_samples([shard])), 16, 32)
    models = FrozenModels(table.space)
    assert len(table) == 2 * len(pictures) == 8
    for views, images in ((range(0, 8, 2), pictures), (range(1, 8, 2), pictures.flip(3))):
        torch.testing.assert_close(table.features(views), models.extract_features(images), atol=0.02, rtol=1e-3)
        torch.testing.assert_close(table.latents(views), models.transform(images), atol=0.01, rtol=1e-3)
    assert table.read_keys()[:2] == [("film0", 0, "train"), ("film0", 30, "train")]


def test_same_shard_same_bytes(shard: Path, features: list[Path], tmp_path: Path) -> None:
    again = write_features([shard], tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in features]


def test_crops_do_not_depend_on_the_shard_that_a_film_lies_in(
    shard: Path, features: list[Path], tmp_path: Path
) -> None:
    other = write_features([write_shard(tmp_path / "other.tar", films=(1,))], tmp_path / "other")
    alone, together = FeatureTable([other[0].parent], "crops"), FeatureTable([features[0].parent], "crops")
    assert torch.equal(alone.latents(range(len(alone))), together.latents(range(len(alone), len(together))))


def test_several_shards_are_one_table(shard: Path, features: list[Path], tmp_path: Path) -> None:
    other = write_features([write_shard(tmp_path / "other.tar", split="test")], tmp_path / "other")
    table = FeatureTable([features[0].parent, other[0].parent], "crops")
    assert len(table) == 16
    assert sorted(table.training_views()) == list(range(8))
    assert torch.equal(table[9][1].float(), FeatureTable([other[0].parent], "crops").latents([1])[0])


def test_several_crops_of_a_keyframe_share_its_split(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "shard.tar", splits=("test", "train", "test", "train"))
    features = write_features([shard], tmp_path / "features", crops_per_keyframe=3)
    table = FeatureTable([features[0].parent], "crops")
    assert len(table) == 24
    assert sorted({view // 2 for view in table.training_views()}) == [3, 4, 5, 9, 10, 11]


def test_features_of_other_models_do_not_mix(features: list[Path], shard: Path, tmp_path: Path) -> None:
    other = write_features([shard], tmp_path / "00007", crop_px=24)
    with pytest.raises(FeatureTableError, match="00007 was made by other models or sizes"):
        FeatureTable([features[0].parent, other[0].parent], "keyframes")
    with pytest.raises(FeatureTableError, match="there are no features"):
        FeatureTable([], "keyframes")


def test_folders_that_moved_between_two_shards_are_the_same(shard: Path, tmp_path: Path) -> None:
    first, second = save_clip(tmp_path / "clip"), save_clip(tmp_path / "moved")
    sizes = {"encoder_height_px": 28, "encoder_width_px": 28}
    made = [write_features([shard], tmp_path / p.name / "f", image_encoder=str(p), **sizes) for p in (first, second)]
    table = FeatureTable([features[0].parent for features in made], "keyframes")
    assert table.space.image_encoder == str(second)


def test_what_changes_nothing_is_not_in_the_recipe() -> None:
    assert "luma" in FeaturesConfig(**SMALL).recipe()
    assert "luma" not in FeaturesConfig().recipe()


def test_clip_and_sdxl_from_their_folders(shard: Path, tmp_path: Path) -> None:
    clip, sdxl = save_clip(tmp_path / "clip"), save_sdxl(tmp_path / "sdxl")
    own = {"image_encoder": str(clip), "vae": str(sdxl)}
    sizes = {"encoder_height_px": 28, "encoder_width_px": 56}
    features = write_features([shard], tmp_path / "features", **own, **sizes)
    table = FeatureTable([features[0].parent], "keyframes")
    assert table.space.latent_channels == 4
    assert table.latents([0]).shape == (1, 4, 2, 4)
    assert table.features([0]).shape == (1, table.space.patches, table.space.feature_dim)
    assert np.isfinite(table.latents(range(8)).numpy()).all()
    config = FeaturesConfig(**{**SMALL, **own, **sizes})
    assert config.is_heavy()
    assert config.recipe().keys().isdisjoint(own)  # folders enter by what they hold
    assert config.weights() == (str(clip), str(sdxl))


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "shard.tar", damaged=3)
    with pytest.raises(ComputationError, match="keyframe film1-00000030 of the shards cannot be decoded"):
        Features(FeaturesConfig(**SMALL))({"shards": [shard]}, tmp_path, tmp_path, no_progress)


@pytest.mark.parametrize(
    ("change", "message"), [({"width_px": 30}, "width_px 30"), ({"encoder_width_px": 50}, "encoder_width_px 50")]
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FeaturesConfig(**{**SMALL, **change})


def test_a_size_that_the_vae_does_not_divide_is_refused(shard: Path, tmp_path: Path) -> None:
    sdxl = save_sdxl(tmp_path / "sdxl")
    with pytest.raises(FeatureTableError, match=r"crop_px 20 \(8\)"):
        Features(FeaturesConfig(**{**SMALL, "vae": str(sdxl), "block_px": 4, "crop_px": 20}))


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = FeaturesConfig()
    assert config.weights() == ("clip_vit_l14", "sdxl")
    assert (config.height_px, config.width_px, config.crop_px) == (512, 896, 768)
    assert json.loads(json.dumps(config.recipe()))["image_encoder"] == "clip_vit_l14"
    assert SPEC.load() is Features
