"""What training of a tiny story model needs: made keyframes, a tiny language model, settings."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaModel

from models.script import Character, FrameScript
from models.token_table import write_token_table
from stages.spec import no_progress
from stages.train_autoregressive import TrainAutoregressive, TrainAutoregressiveConfig

WIDTHS = {"tokens_per_frame": 2, "token_dim": 4, "text_width": 6, "face_width": 3}
PLACES = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def make_rows(films: int = 2, frames: int = 20, heldout: int = 6, faces: bool = True) -> list[dict[str, Any]]:
    """Films whose tokens follow from the script: the sentence embedding says which of four places is shown."""
    rows = []
    for film in range(films):
        for index in range(frames):
            rng = np.random.default_rng([film, index])
            place = rng.integers(4)
            person = Character(identity="Person 1", character_index=0)
            script = FrameScript(characters=[person], plot=[f"Place {place}."])
            tokens = PLACES[place, :4] + 0.1 * rng.standard_normal((2, 4))
            rows.append({
                "film_id": f"film {film}", "frame_index": index * 5, "time_s": index / 5, "shot_index": 0,
                "split": "train" if index < frames - heldout else "heldout",
                "tokens": tokens, "mirrored_tokens": tokens[:, ::-1],
                "script": script.model_dump_json(), "mirrored_script": script.mirrored().model_dump_json(),
                "sentence_embeddings": PLACES[[place]], "mirrored_sentence_embeddings": PLACES[[place]],
                "face_character": [0] if faces else [],
                "face_embeddings": np.full(3 if faces else 0, 100 * film + index, np.float32),
            })  # fmt: skip
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The folder of a table of tokens."""
    table = folder / "tokens"
    table.mkdir(parents=True, exist_ok=True)
    write_token_table([rows], table, WIDTHS)
    return table


def write_trunk(folder: Path) -> str:
    """A tiny language model in the Hugging Face layout."""
    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"?": 0, "Plot:": 1, "Characters:": 2}, unk_token="?"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(folder)


def make_config(trunk: str, **changes: Any) -> TrainAutoregressiveConfig:
    settings: dict[str, Any] = {
        "trunk": trunk, "window_frames": 6, "batch_windows": 4, "steps": 8, "components": 3, "learning_rate": 1e-3,
        "new_learning_rate": 3e-3, "warmup_steps": 4, "references": 3, "shuffles": 2, "evaluation_steps": 4,
        "checkpoint_steps": 3, "loader_workers": 0,
    }  # fmt: skip
    return TrainAutoregressiveConfig(**settings | changes)


def train(config: TrainAutoregressiveConfig, table: Path, folder: Path, progress: Any = no_progress) -> dict[str, Any]:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    return TrainAutoregressive(config)({"tokens": sorted(table.iterdir())}, out, scratch, progress)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}
