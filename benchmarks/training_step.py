"""A training step of the story model against one of its trunk as a language model, and how long data is waited for.

    python benchmarks/training_step.py [--device cpu] [--trunk-size small] [--hidden 512] [--layers 4]
        [--positions 1024] [--batch 1] [--mask-probability 0.15] [--residual-dropout 0.5] [--precision float32]
        [--checkpointing] [--repetitions 7] [--loader-steps 20] [--loader-workers 2] [--json]
    python benchmarks/training_step.py --fake    # arithmetic and memory of both at 7B, on tensors that hold nothing

Both sides train the same LLaMA trunk on sequences of the same length: ours with projected inputs, frame tokens, the
mixture head and the paper's losses; the peer as its makers do, from words, with the cross-entropy over 32,000 words.
A step is forward, backward, clipping of gradients and AdamW. They take turns, after one of each that is not counted;
numbers are medians. The peer has no dropout and no masks: `ratio` says what all of the story model costs, and
`ratio_plain` what it costs with its three measures against overfitting turned off.

The loader's share is measured on a table of made keyframes, with the same trunk: time spent waiting for the next
batch by time of the steps. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.autoregressive import AutoregressiveConfig, AutoregressiveModel
from models.footprint import measure
from models.language_model import build_language_model
from models.processes import autocast
from models.script import Character, FrameScript
from models.sequence import Frame, SequenceBatch, build_sequence, collate_sequences
from models.token_table import TokenTable, write_token_table
from models.training import TrainingRun
from models.training_windows import TrainingWindows, WindowSettings, load_windows
from models.training_workloads import FRAME, StepSettings, Training, story_step

WIDTHS = {"tokens_per_frame": 2, "token_dim": 1024, "text_width": 768, "face_width": 512}
WORDS = 32_000
SENTENCES = 14
RATE = 1e-5
LLAMA2_7B = {"hidden": 4096, "layers": 32}


def describe_trunk(hidden: int, layers: int, positions: int) -> dict[str, Any]:
    """The proportions of LLaMA 2 at another width."""
    return {
        "vocab_size": WORDS, "hidden_size": hidden, "intermediate_size": 11008 * hidden // 4096,
        "num_hidden_layers": layers, "num_attention_heads": max(1, hidden // 128),
        "num_key_value_heads": max(1, hidden // 128), "max_position_embeddings": max(4096, positions),
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip


def make_frame(rng: np.random.Generator) -> Frame:
    """A keyframe with two characters and a script of the usual length."""
    people = [Character(identity=f"Person {i}", description=["a", "b", "c"]) for i in range(2)]
    script = FrameScript(characters=people, plot=["s"] * (SENTENCES - 6))
    layout = script.layout()

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    sentences = sum(piece.kind == "sentence" for piece in layout)
    faces = {index: draw(WIDTHS["face_width"]) for index in range(2)}
    return Frame(layout, draw(sentences, WIDTHS["text_width"]), faces, draw(2, WIDTHS["token_dim"]))


def make_tokenizer() -> Tokenizer:
    """Enough of one to read identifiers."""
    return Tokenizer(WordLevel({"?": 0}, unk_token="?"))


def make_batch(batch: int, positions: int) -> SequenceBatch:
    """Sequences of about the wanted length."""
    rng, tokenizer = np.random.default_rng(0), make_tokenizer()
    length = len(build_sequence([make_frame(rng)], tokenizer).kinds)
    frames = max(1, round(positions / length))
    sequences = [build_sequence([make_frame(rng) for _ in range(frames)], tokenizer) for _ in range(batch)]
    return collate_sequences(sequences, WIDTHS["text_width"], WIDTHS["face_width"], WIDTHS["token_dim"])


def make_story_step(call: argparse.Namespace, batch: SequenceBatch) -> tuple[Callable[[], None], AutoregressiveModel]:
    """A step of the story model."""
    torch.manual_seed(0)
    trunk = build_language_model(describe_trunk(call.hidden, call.layers, call.positions))
    config = AutoregressiveConfig(
        {}, **WIDTHS, residual_dropout=call.residual_dropout, mask_probability=call.mask_probability
    )
    model = AutoregressiveModel(config, trunk, make_tokenizer()).to(call.device).train()
    model.precision = call.precision
    if call.checkpointing:
        model.trunk.activation_checkpointing_enable()
    run = TrainingRun(model.new_parameters(), model.trunk_parameters(), seed=0)
    batch = batch.to(call.device)

    def step() -> None:
        losses = model.losses(batch)
        run.update(losses.total, RATE, RATE)

    return step, model


def make_peer_step(call: argparse.Namespace, batch: SequenceBatch) -> Callable[[], None]:
    """A step of the same trunk as a language model."""
    torch.manual_seed(0)
    fields = describe_trunk(call.hidden, call.layers, call.positions)
    model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="sdpa")).to(call.device).train()
    model.model.embed_tokens.requires_grad_(False)  # as with us
    if call.checkpointing:
        model.activation_checkpointing_enable()
    run = TrainingRun({name: p for name, p in model.named_parameters() if p.requires_grad}, seed=0)
    words = torch.randint(0, WORDS, batch.kinds.shape, device=call.device)

    def step() -> None:
        with autocast(call.device, call.precision):
            loss = model(input_ids=words, labels=words, use_cache=False).loss
        run.update(loss, RATE)

    return step


def take_time(step: Callable[[], Any], device: str) -> float:
    """Seconds of one step: of the wall clock on an accelerator, of this process's threads on a CPU that others use."""
    if device == "cpu":
        started = time.process_time()
        step()
        return time.process_time() - started
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_steps(call: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns: ours, ours without measures against overfitting, the peer."""
    batch = make_batch(call.batch, call.positions)
    ours, model = make_story_step(call, batch)
    full = model.config
    plain = replace(full, input_dropout=0.0, mask_probability=0.0)

    def ours_plain() -> None:
        model.config = plain
        set_residual_dropout(model, False)
        ours()
        model.config = full
        set_residual_dropout(model, True)

    sides = {"ours": ours, "plain": ours_plain, "peer": make_peer_step(call, batch)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(call.repetitions + 1):
        for name, step in sides.items():
            seconds = take_time(step, call.device)
            if repetition:
                times[name].append(seconds)
    pairs = list(zip(*times.values(), strict=True))
    return {
        "ratio": round(statistics.median(a / c for a, _, c in pairs), 3),
        "ratio_plain": round(statistics.median(b / c for _, b, c in pairs), 3),
        **{f"{name}_s": round(statistics.median(values), 4) for name, values in times.items()},
        "positions": int(batch.kinds.shape[1]),
        "frames": int(len(batch.tokens) / 2 / call.batch),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def set_residual_dropout(model: AutoregressiveModel, on: bool) -> None:
    """Turn the dropout of the trunk's branches on or off; it acts while they are in training."""
    for layer in model.trunk.layers:
        layer.self_attn.o_proj.train(on)
        layer.mlp.down_proj.train(on)


def write_table(folder: Path, frames: int) -> TokenTable:
    """A table of made keyframes of one film, each with a script of the usual length."""
    rng, rows = np.random.default_rng(0), []
    people = [Character(identity=f"Person {i}", character_index=i, description=["a", "b", "c"]) for i in range(2)]
    script = FrameScript(characters=people, plot=["s"] * (SENTENCES - 6))
    sentences = sum(piece.kind == "sentence" for piece in script.layout())
    for index in range(frames):
        tokens = rng.standard_normal((2, WIDTHS["token_dim"]), np.float32)
        words = rng.standard_normal((sentences, WIDTHS["text_width"]), np.float32)
        rows.append({
            "film_id": "film", "frame_index": index, "time_s": float(index), "shot_index": 0, "split": "train",
            "tokens": tokens, "mirrored_tokens": tokens, "script": script.model_dump_json(),
            "mirrored_script": script.model_dump_json(), "sentence_embeddings": words,
            "mirrored_sentence_embeddings": words, "face_character": [0, 1],
            "face_embeddings": rng.standard_normal((2, WIDTHS["face_width"]), np.float32),
        })  # fmt: skip
    write_token_table([rows], folder, WIDTHS)
    return TokenTable(folder)


def measure_loader(call: argparse.Namespace) -> dict[str, Any]:
    """Waiting for the next batch as a share of the steps, by the loader that training uses."""
    batch = make_batch(call.batch, call.positions)
    frames = int(len(batch.tokens) / 2 / call.batch)
    _, model = make_story_step(call, batch)
    run = TrainingRun(model.new_parameters(), model.trunk_parameters(), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(Path(folder), 4 * frames)
        settings = WindowSettings(frames, call.batch, 1, 0.5, 0.5, 0.0, 10, 0.5, 0)
        windows = TrainingWindows(table, model.tokenizer, settings)
        started = time.perf_counter()
        windows[0, 0]
        drawn_s = time.perf_counter() - started
        batches = load_windows(windows, range(call.loader_steps + 1), 1, call.loader_workers, call.device)
        waits, steps = [], []
        for _ in range(call.loader_steps + 1):
            started = time.perf_counter()
            _, batch = next(batches)
            waits.append(time.perf_counter() - started)
            run.update(model.losses(batch.to(call.device)).total, RATE, RATE)
            if call.device == "cuda":
                torch.cuda.synchronize()
            steps.append(time.perf_counter() - started)
    return {
        "wait_share": round(sum(waits[1:]) / sum(steps[1:]), 4),
        "first_wait_s": round(waits[0], 2),
        "draw_s": round(drawn_s, 4),
        "loader_workers": call.loader_workers,
    }


def measure_fakes() -> dict[str, Any]:
    """A step of both at the size of LLaMA2-7B, on as many positions as 128 keyframes take."""
    settings = StepSettings()
    ours = story_step(settings)
    story = measure(lambda: ours.build("cpu"), ours.run)
    positions = 128 * len(FRAME) + 10 * WIDTHS["tokens_per_frame"]  # after ten references
    language = measure(lambda: _build_language_step(settings, positions), lambda training: training())
    return {
        "positions": positions,
        "tflops": round(story.flops / 1e12, 1),
        "peer_tflops": round(language.flops / 1e12, 1),
        "arithmetic_ratio": round(story.flops / language.flops, 4),
        "peak_gib": round(story.peak_bytes / 2**30, 2),
        "peer_peak_gib": round(language.peak_bytes / 2**30, 2),
    }


def _build_language_step(settings: StepSettings, positions: int) -> Training:
    described = describe_trunk(**LLAMA2_7B, positions=positions)
    model = LlamaForCausalLM(LlamaConfig(**described, attn_implementation="sdpa")).float().train()
    model.model.activation_checkpointing_enable()
    words = torch.zeros(settings.batch, positions, dtype=torch.long)

    def loss() -> torch.Tensor:
        with autocast("cpu", settings.precision):
            return model(input_ids=words, labels=words, use_cache=False).loss

    return Training(model, model.model.layers, lambda: [dict(model.named_parameters())], loss, settings)


def main() -> None:
    """Parse the call, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trunk-size", choices=("small", "7b"), default="small", help="7b: LLaMA2-7B's sizes")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mask-probability", type=float, default=0.15)
    parser.add_argument("--residual-dropout", type=float, default=0.5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--loader-steps", type=int, default=20)
    parser.add_argument("--loader-workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--fake", action="store_true")
    call = parser.parse_args()
    if call.fake:
        print(json.dumps(measure_fakes()))
        return
    if call.trunk_size == "7b":
        vars(call).update(LLAMA2_7B)
    result = measure_steps(call) | measure_loader(call)
    result |= {"device": call.device, "precision": call.precision, "threads": torch.get_num_threads()}
    if not call.json:
        print(f"{result['ratio']} of the peer's step ({result['ratio_plain']} without dropout and masks)")
        print(f"{result['wait_share']:.1%} of the time is spent waiting for data")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
