"""Seconds a generated keyframe takes, early and late in a long story, with fresh windows and with one that slides.

    python benchmarks/generation.py [--frames 16 128 1024 4096] [--around 48] [--window 128] [--stories 1]
        [--guidance 0] [--trunk-size small] [--device cpu] [--json]

A trunk with random weights samples stories; each script is a name, five sentences and a face, ten positions, and a
keyframe has two tokens. For each window and each of `--frames` a story is brought to shortly before that keyframe.
Then all of them make a keyframe in turn, so that what else the machine does meets all alike. Reported are medians over
the keyframes around each of `--frames`, and their ratios; means, too, because a fresh window is dear but rare.
`flatness` is the largest over the smallest median of the sliding window. Memory: bytes of keys and values, how much the
process's resident set grew on the way to each keyframe, and the device's peak.

`--trunk-size 7b` has the shape of LLaMA2-7B, in bfloat16. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.autoregressive import AutoregressiveConfig, AutoregressiveModel, halve_trunk
from models.generation import Prompt, Sampler, Sampling
from models.language_model import build_language_model
from models.script import Character, FrameScript
from models.sequence import Frame

TRUNKS = {
    "small": {
        "vocab_size": 64, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
    "7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip
WIDTHS = {"small": (32, 384, 384), "7b": (1024, 768, 512)}
"""Of a token, a sentence and a face."""
WINDOWS = ("restart", "slide")


def make_model(size: str, device: str) -> AutoregressiveModel:
    """A story model with random weights; the larger trunk in bfloat16."""
    torch.manual_seed(0)
    token_dim, text_width, face_width = WIDTHS[size]
    config = AutoregressiveConfig(
        TRUNKS[size], tokens_per_frame=2, token_dim=token_dim, text_width=text_width, face_width=face_width
    )
    with torch.device(device):
        trunk = build_language_model(config.trunk)
        model = AutoregressiveModel(config, trunk, Tokenizer(WordLevel({"?": 0}, unk_token="?"))).eval()
    return model if size == "small" else halve_trunk(model)


def make_story(count: int, size: str) -> list[Frame]:
    """Scripts of ten positions: the frame's two marks, name, "Plot:", five sentences, a face."""
    _, text_width, face_width = WIDTHS[size]
    rng = np.random.default_rng(0)
    layout = FrameScript(characters=[Character(identity="A", description=["a"])], plot=["b"] * 4).layout()
    texts = sum(piece.kind == "sentence" for piece in layout)
    faces = {0: rng.standard_normal(face_width).astype(np.float32)}
    return [Frame(layout, rng.standard_normal((texts, text_width)).astype(np.float32), faces) for _ in range(count)]


def time_frame(sampler: Sampler, device: str) -> float:
    """Seconds until the next keyframe is there."""
    started = time.perf_counter()
    sampler.make_frames()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def measure(call: argparse.Namespace) -> dict[str, Any]:
    """Bring a story to each point with each window, then time all of them in turns."""
    model = make_model(call.trunk_size, call.device)
    story = make_story(max(call.frames) + call.around, call.trunk_size)
    sampling = Sampling(window_frames=call.window, overlap_frames=call.overlap, guidance=call.guidance)
    prompts = [Prompt(story, seed=seed) for seed in range(call.stories)]
    samplers, grown = {}, {}
    for window in WINDOWS:
        for point in call.frames:
            sampler = samplers[window, point] = Sampler(model, prompts, replace(sampling, window=window))
            sampler.make_frames()  # the first one warms up
            before = resident_mb()
            for _ in range(1, point - call.around // 2):
                sampler.make_frames()
            grown[window, point] = resident_mb() - before
            print(f"{window}: keyframe {point} is near", file=sys.stderr)
    rounds = [{key: time_frame(sampler, call.device) for key, sampler in samplers.items()} for _ in range(call.around)]
    return {
        **summarize(rounds, call.frames),
        "cache_mb": {window: round(samplers[window, call.frames[0]].cache_bytes / 1e6, 3) for window in WINDOWS},
        "grown_mb": {window: {str(p): round(grown[window, p], 1) for p in call.frames} for window in WINDOWS},
        "resident_mb": round(resident_mb(), 1),
        "device_peak_mb": torch.cuda.max_memory_allocated() / 1e6 if call.device.startswith("cuda") else None,
        "window_frames": call.window,
        "overlap_frames": call.overlap,
        "stories": call.stories,
        "guidance": call.guidance,
        "around": call.around,
        "trunk": call.trunk_size,
        "device": call.device,
        "threads": torch.get_num_threads(),
    }


def summarize(rounds: list[dict[tuple[str, int], float]], points: list[int]) -> dict[str, Any]:
    """Medians and means at each point in milliseconds, and their ratios."""

    def table(average: Callable[[list[float]], float]) -> dict[str, dict[str, float]]:
        return {w: {str(p): round(1e3 * average([r[w, p] for r in rounds]), 3) for p in points} for w in WINDOWS}

    medians, means, last = table(statistics.median), table(statistics.fmean), str(points[-1])
    slide = medians["slide"].values()
    return {
        "flatness": round(max(slide) / min(slide), 3),
        "ratio": round(medians["restart"][last] / medians["slide"][last], 3),
        "peer": "the same trunk with fresh windows, in turns",
        "median_ms": medians,
        "mean_ms": means,
    }


def main() -> None:
    """Parse the call, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 128, 1024, 4096], help="where to look")
    parser.add_argument("--around", type=int, default=48, help="keyframes that a median is taken over")
    parser.add_argument("--window", type=int, default=128, help="keyframes that the model sees at once")
    parser.add_argument("--overlap", type=int, default=16, help="keyframes that a fresh window takes over")
    parser.add_argument("--stories", type=int, default=1, help="sampled in one batch")
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--trunk-size", choices=TRUNKS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    call = parser.parse_args()
    result = measure(call)
    if not call.json:
        for window in WINDOWS:
            times = ", ".join(f"{ms} ms at {point}" for point, ms in result["median_ms"][window].items())
            print(f"{window}: {times}; keys and values {result['cache_mb'][window]:.1f} MB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
