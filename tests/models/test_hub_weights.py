"""Weights of the paper's size, brought from a folder, converted, or refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.convert_weights import convert_longclip
from models.farl import load_farl
from models.grounding_dino import GroundingDino
from models.hub_weights import MANIFEST
from models.weights import TABLE, WeightsError, folder, identity, missing_files, pull
from tests.tiny_checkpoints import save_farl, save_grounding_dino
from tests.tiny_pipelines import write_sdxl_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def brought(tmp_path):
    """A folder with what was brought by hand, and an empty one for weights."""
    (tmp_path / "brought by hand").mkdir()
    return tmp_path / "brought by hand", tmp_path / "weights"


@pytest.mark.parametrize("place", ["grounding_dino", "grounding-dino-base", "."])
def test_a_folder_is_taken_as_it_is_and_listed(brought, place):
    source, into = brought
    save_grounding_dino(source / place)
    (source / place / "README.md").write_text("not needed")
    (source / place / "private").mkdir()
    (source / place / "private" / "letter.txt").write_text("not theirs")
    assert missing_files("grounding_dino", into) == [into / "grounding_dino" / MANIFEST]
    pull(["grounding_dino"], into, print, source)
    assert missing_files("grounding_dino", into) == []
    kept = folder("grounding_dino", into)
    assert set(json.loads((kept / MANIFEST).read_text())["files"]) >= {"model.safetensors", "config.json"}
    assert not (kept / "README.md").exists() and not (kept / "private").exists()
    GroundingDino(kept, "person", "cpu")
    (kept / "config.json").unlink()
    assert missing_files("grounding_dino", into) == [kept / "config.json"]


def test_what_the_table_asks_for_since_then_is_missing_and_comes_with_the_next_pull(brought):
    source, into = brought
    write_sdxl_pipeline(source / "sdxl")
    pull(["sdxl"], into, print, source)
    kept = into / "sdxl"
    whole = json.loads((kept / MANIFEST).read_text())
    older = {name: digest for name, digest in whole["files"].items() if name.startswith(("unet/", "vae/"))}
    (kept / MANIFEST).write_text(json.dumps(whole | {"files": older}))
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        shutil.rmtree(kept / part)
    missing = [path.relative_to(kept).as_posix() for path in missing_files("sdxl", into)]
    assert missing == [
        "text_encoder/model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors", "tokenizer/*", "tokenizer_2/*",
        "scheduler/scheduler_config.json", "model_index.json",
    ]  # fmt: skip
    pull(["sdxl"], into, print, source)
    assert missing_files("sdxl", into) == []
    assert json.loads((kept / MANIFEST).read_text()) == whole
    assert all((kept / name).is_file() for name in whole["files"])


def test_a_pickle_is_converted_once_and_read_without_code(brought):
    source, into = brought
    tower = save_farl(source / "FaRL-Base-Patch16-LAIONFace20M-ep64.pth")
    pull(["farl"], into, print, source)
    (kept,) = folder("farl", into).glob("*.safetensors")
    assert not list(folder("farl", into).glob("*.pth"))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(
            load_farl(kept)(pixel_values=images).image_embeds, tower(images), atol=1e-4, rtol=1e-4
        )
    assert all(name.startswith("visual.") for name in load_file(kept))


def test_a_pickle_that_holds_code_runs_nothing_and_leaves_nothing(brought, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    source, into = brought
    torch.save({"state_dict": Evil()}, source / "FaRL-x.pth")
    with pytest.raises(WeightsError, match=r"cannot convert .*FaRL-x.pth"):
        pull(["farl"], into, print, source)
    assert not (tmp_path / "ran").exists()
    assert missing_files("farl", into) == [into / "farl" / MANIFEST]
    assert not [path for path in into.iterdir() if path.name.startswith(".")]


def test_what_was_brought_by_hand_is_told_apart_by_its_files(brought):
    source, into = brought
    save_farl(source / "FaRL-a.pth")
    pull(["farl"], into, print, source)
    first = identity("farl", into)
    (into / "farl" / MANIFEST).unlink()
    (source / "FaRL-a.pth").unlink()
    torch.save({"visual.proj": torch.ones(2, 2)}, source / "FaRL-a.pth")
    pull(["farl"], into, print, source)
    assert identity("farl", into) != first
    again = into.parent / "another host"
    pull(["farl"], again, print, into)
    assert identity("farl", again) == identity("farl", into), "converted weights may be handed on"


def test_a_folders_weights_are_not_taken_for_those_of_the_hubs_commit(brought):
    source, into = brought
    absent = identity("grounding_dino", into)
    assert absent == identity("grounding_dino", source), "what comes from a hub is told by its commit"
    save_grounding_dino(source / "grounding_dino")
    pull(["grounding_dino"], into, print, source)
    assert identity("grounding_dino", into) != absent


def test_what_cannot_be_had_does_not_keep_the_others_from_coming(brought):
    source, into = brought
    save_grounding_dino(source / "grounding_dino")
    save_grounding_dino(source)  # files of the same names as SAM 2's
    with pytest.raises(WeightsError, match="holds no farl") as caught:
        pull(["farl", "grounding_dino", "sam2"], into, print, source)
    assert "holds no sam2" in str(caught.value)
    assert missing_files("grounding_dino", into) == []


def test_what_is_not_there_is_said_with_the_remedy(brought):
    source, into = brought
    with pytest.raises(WeightsError, match=r"holds no grounding_dino: expected model.safetensors"):
        pull(["grounding_dino"], into, print, source)
    with pytest.raises(WeightsError, match=r"farl is on no hub: put FaRL-.* then `moviedreamer weights pull"):
        pull(["farl"], into, print)


def test_a_hub_out_of_reach_is_said_with_the_remedy(tmp_path):
    command = [sys.executable, "-m", "flows.cli", "weights", "pull", "clip_vit_l14", "--dir", str(tmp_path)]
    variables = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "cannot fetch openai/clip-vit-large-patch14 at 32bd64288804" in done.stderr
    assert "weights pull clip_vit_l14 --from DIR" in done.stderr


def test_the_tables_entries_are_whole():
    for name, weight in TABLE.items():
        assert weight.licence and weight.purpose and weight.carrier and weight.size_mb > 0, name
        if revision := getattr(weight, "revision", None):
            assert len(revision) == 40 and set(revision) <= set("0123456789abcdef"), name


def test_longclips_positions_are_put_together_from_both_tables():
    state = {
        "positional_embedding": torch.zeros(248, 4), "positional_embedding_res": torch.ones(248, 4),
        "token_embedding.weight": torch.zeros(9, 4), "visual.proj": torch.zeros(2, 2), "logit_scale": torch.tensor(1.0),
    }  # fmt: skip
    kept = convert_longclip(state)
    assert set(kept) == {"positional_embedding", "token_embedding.weight"}
    assert kept["positional_embedding"].sum(1).tolist() == [0.0] * 20 + [4.0] * 228
    del state["positional_embedding_res"]
    with pytest.raises(ValueError, match="the trained positions are lost"):
        convert_longclip(state)
