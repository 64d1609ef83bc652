"""The whole way with the paper's models: tiny checkpoints in the published layouts, and an endpoint over a socket."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pyarrow.parquet as pq

from flows.workspace import Workspace
from models import weights
from models.script import FrameScript
from storage.artifacts import read_rows
from tests.chat_server import ScriptedServer, completion
from tests.stages.test_chat_stages import see, step_of
from tests.tiny_checkpoints import (
    save_aesthetic,
    save_clip,
    save_farl,
    save_grounding_dino,
    save_inception,
    save_insightface,
    save_llama,
    save_longclip,
    save_sam2,
    save_sdxl,
    save_svd,
)


def answer(body: dict[str, Any]) -> Any:
    """Names colours of pictures; writes scripts for the characters that it is told of."""
    if "description" not in json.dumps(body["response_format"]) and "plot" not in json.dumps(body["response_format"]):
        return see(body)
    text = body["messages"][-1]["content"]
    names = re.search(r"(?:Characters, in this order|characters of the frame are|by their names): (.+?)\.", text)
    people = [] if names is None or names[1] == "none" else names[1].split(", ")
    sentence = {"text": "A thing.", "captions": [1]}
    script = {
        "characters": [{"identity": name, "description": [sentence]} for name in people],
        "scene_elements": [sentence],
        "plot": [],
    }
    extracted = {"scene_elements": ["A thing."], "plot": ["It stands."]}
    answers = {"fuse": {"description": "A thing."}, "extract": extracted, "script": script}
    return completion(json.dumps(answers[step_of(body)]))


def tiny_models(folder: Path, clip: str) -> dict[str, Any]:
    """Sections of training, generation and evaluation, with few steps and small sizes."""
    save_longclip(folder / "longclip")
    weights.pull(["longclip_l"], folder / "weights", source=folder / "longclip")
    save_inception(folder / "inception.pth")
    save_aesthetic(folder / "aesthetic.pth")
    sdxl, longclip = str(save_sdxl(folder / "sdxl")), str(folder / "weights" / "longclip_l")
    trunk = str(save_llama(folder / "llama"))
    decoder = {"micro_batches": 2, "processes": 1, "loader_workers": 0, "sampling_steps": 2}
    phase = {"steps": 2, "compressor_steps": 1, "batch_size": 4, "learning_rate": 1e-4}
    return {
        "generate": {"scenes": 2, "frames_per_scene": 2},
        "features": {
            "image_encoder": clip, "vae": sdxl, "encoder_height_px": 28, "encoder_width_px": 28, "height_px": 64,
            "width_px": 96, "crop_px": 64,
        },
        "train_autoencoder": {
            **decoder, "pretrained": sdxl, "token_dim": 8, "compressor_width": 16, "compressor_heads": 2,
            "image_phase": {**phase, "data": "crops", "schedule": "cosine"},
            "film_phase": {**phase, "data": "keyframes", "schedule": "constant"},
        },
        "tokenize": {"text_encoder": longclip},
        "train_renderer": {**decoder, "steps": 2, "batch_size": 4},
        "train_autoregressive": {
            "trunk": trunk, "steps": 2, "batch_windows": 2, "micro_batches": 2, "processes": 1,
            "loader_workers": 0, "window_frames": 3, "shuffles": 1,
        },
        "score": {"window_frames": 3},
        "dream": {"text_encoder": longclip, "window_frames": 3, "overlap_frames": 1, "window": "slide",
                  "guidance": 0.5},
        "render": {"sampling_steps": 2, "scheduler": "EulerDiscreteScheduler"},
        "animate": {
            "seconds_per_keyframe": 1.0, "height_px": 64,
            "svd": {
                "weights": str(save_svd(folder / "svd")), "frames": 4, "height_px": 64, "width_px": 64, "steps": 2,
                "precision": "float32",
            },
        },
        "evaluate": {
            "clip": clip, "inception": str(folder / "inception.pth"), "aesthetic": str(folder / "aesthetic.pth"),
        },
    }  # fmt: skip


def test_a_film_goes_the_whole_way_with_the_papers_models(tmp_path):
    save_farl(tmp_path / "farl.pth")
    choice = {
        "detector": "insightface", "conditioning": "farl", "identity": "arcface",
        "farl_weights": str(tmp_path / "farl.pth"),
        "insightface_weights": str(save_insightface(tmp_path / "buffalo l")),
    }  # fmt: skip
    clip = str(save_clip(tmp_path / "clip"))
    with ScriptedServer(answer) as server:
        asked = {"model": "any", "endpoint_url": server.url, "answers": str(tmp_path / "answers.sqlite"), "attempts": 1}
        sections = {
            "engine": {"executor": "inline"},
            "keyframes": {"every_n_frames": 100},
            "people": {
                "detector_weights": str(save_grounding_dino(tmp_path / "dino")),
                "mask_weights": str(save_sam2(tmp_path / "sam")),
                "min_score": 0.0,
            },
            "faces": {"models": choice, "min_face_px": 2},
            "captions": {**asked, "check_weights": clip},
            "scripts": asked,
            **tiny_models(tmp_path, clip),
        }
        for name in ("dream", "evaluate"):
            sections[name] = {**sections[name], "face_models": choice}
        profile = tmp_path / "mine.yaml"
        profile.write_text(json.dumps({"base": "paper", **sections}))
        film = weights.folder("demo_films") / "bikes.mp4"
        command = [sys.executable, "-m", "flows.cli", "run", str(film), "--profile", str(profile), "--json"]
        command += ["--workspace", str(tmp_path / "w"), "--out", str(tmp_path / "movie.mp4")]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    looked = ("keyframes", "people", "faces", "identities", "captions", "scripts", "shards", "features")
    learned = ("train_autoencoder", "tokenize", "train_renderer", "train_autoregressive")
    assert summary["computed"] == dict.fromkeys((*looked, *learned, "dream", "render", "animate", "evaluate"), 1)
    workspace = Workspace.open(tmp_path / "w")
    rows = {
        kind: list(read_rows(workspace.store, workspace.catalog.current(kind, "bikes.mp4").tables))
        for kind in ("people", "captions", "scripts")
    }
    assert {row["source"] for row in rows["people"]} == {"detector"}
    assert all(row["mask_png"] for row in rows["people"])
    assert {row["captioner"] for row in rows["captions"]} == {"vlm any"}
    assert len(rows["captions"]) == len(rows["people"]) + len(rows["scripts"])
    for row in rows["scripts"]:
        script = FrameScript.model_validate_json(row["script"])
        assert len(script.characters) == 5 and row["captions"] == [[1]] * len(script.sentences())
    evaluation = workspace.catalog.current("evaluation", "retold")
    numbers = {n["name"]: n for n in json.loads(workspace.store.path(evaluation.file("evaluation.json")).read_text())}
    for name in ("CLIP score", "CLIP-sim", "aesthetic score", "FID"):
        assert numbers[name]["value"] is not None, numbers[name]["computed_with"]
    kept = workspace.catalog.current("pictures", "retold").file("pictures.parquet")
    pictures = pq.read_metadata(workspace.store.path(kept)).num_rows
    workspace.catalog.close()
    with av.open(str(tmp_path / "movie.mp4")) as movie:
        assert sum(1 for _ in movie.decode(video=0)) == 24 * pictures  # a second of each
