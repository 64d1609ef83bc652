"""An ingestion with the paper's models: tiny checkpoints in the published layouts, and an endpoint over a socket."""

import json
import re
import subprocess
import sys
from typing import Any

from flows.workspace import Workspace
from models import weights
from models.script import FrameScript
from storage.artifacts import read_rows
from tests.chat_server import ScriptedServer, completion
from tests.stages.test_chat_stages import see, step_of
from tests.tiny_checkpoints import save_clip, save_farl, save_grounding_dino, save_insightface, save_sam2


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


def test_a_film_is_ingested_with_the_papers_models(tmp_path):
    save_farl(tmp_path / "farl.pth")
    choice = {
        "detector": "insightface", "conditioning": "farl", "identity": "arcface",
        "farl_weights": str(tmp_path / "farl.pth"),
        "insightface_weights": str(save_insightface(tmp_path / "buffalo l")),
    }  # fmt: skip
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
            "captions": {**asked, "check_weights": str(save_clip(tmp_path / "clip"))},
            "scripts": asked,
        }
        profile = tmp_path / "mine.yaml"
        profile.write_text(json.dumps({"base": "paper", **sections}))
        film = weights.folder("demo_films") / "bikes.mp4"
        command = [sys.executable, "-m", "flows.cli", "ingest", str(film), "--profile", str(profile), "--json"]
        done = subprocess.run([*command, "--workspace", str(tmp_path / "w")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["computed"] == dict.fromkeys(
        ("keyframes", "people", "faces", "identities", "captions", "scripts", "shards"), 1
    )
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
    workspace.catalog.close()
