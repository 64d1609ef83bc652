"""How fast the paper profile's networks run on a device, at their published sizes with random weights.

    python benchmarks/rates.py [--device cuda] [--networks NAME,...] [--peak-tflops N] [--repetitions 5] [--json]
    python benchmarks/rates.py --fake     # parameters, memory and arithmetic, on tensors that hold nothing
    python benchmarks/rates.py --tiny     # the same with tiny networks, to try the script where there is no accelerator

Each network is built on the device, run once without being counted, and then a few times; the median counts. Beside
units a second stand what the device computed a second, its utilisation (the arithmetic that the model needs, recomputed
activations not counted, by what the device could do: `--peak-tflops`, known for some), and the most memory it held. A
network that does not fit is told as such. NAME is the beginning of a workload's name.

Rates go to ~/.cache/moviedreamer/rates, network by network, where `moviedreamer doctor --keyframes` finds them; those
of tiny networks do not. The last line is one JSON object. No weights are needed.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flows.needs import CACHE_DIR, rates_path
from models import training_workloads, workloads
from models.autoencoder_sizes import Architecture
from models.published_sizes import PUBLISHED, TINY
from models.training_workloads import StepSettings
from models.workloads import Workload
from stages.train_autoencoder import TrainAutoencoderConfig

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense products in bfloat16, as NVIDIA's data sheets give them for the SXM boards."""


@dataclass(frozen=True)
class Case:
    """A workload to time.

    Attributes:
        useful: The same without what is computed twice, where that differs: the arithmetic that utilisation counts.
    """

    workload: Workload
    useful: Workload | None = None


def choose_cases(tiny: bool) -> list[Case]:
    """Every network of the paper profile, small ones first."""
    sizes, few = (TINY, {"requests": 2}) if tiny else (PUBLISHED, {})
    chat = [(name, make) for name in workloads.CHAT_MODELS for make in (workloads.chat_prompt, workloads.chat_word)]
    picture = {"height": 64, "width": 64} if tiny else {}
    inference = [
        workloads.farl(sizes, 1 if tiny else 32),
        workloads.clip_patches(sizes),
        workloads.clip(sizes),
        workloads.longclip(sizes),
        workloads.grounding_dino(sizes, **picture),
        workloads.sam2(sizes),
        workloads.vae_encode(sizes, **picture),
        workloads.vae_encode(sizes, **(picture or {"height": 768, "width": 768})),
        workloads.vae_decode(sizes, **picture),
        workloads.svd_image_encoder(sizes),
        workloads.svd_decode(sizes, **(picture | {"frames": 2} if tiny else {})),
        workloads.svd_unet(sizes, **(picture | {"frames": 3} if tiny else {})),
        *(make(name, sizes, **few) for name, make in chat),
        workloads.chat_prompt("qwen3_vl_8b", sizes, pictures=False, **few),
        training_workloads.story_frame(3 if tiny else 127, sizes),
    ]
    return [Case(workload) for workload in inference] + _training_cases(tiny)


def _training_cases(tiny: bool) -> list[Case]:
    sizes, batch = (TINY, 2) if tiny else (PUBLISHED, 4)
    pixels = {"height_px": 64, "width_px": 64, "crop_px": 64} if tiny else {}
    space = training_workloads.published_space(sizes, **pixels)
    architecture = Architecture.from_settings(TrainAutoencoderConfig(), space)
    shapes = ((space.crop_px, space.crop_px), (space.height_px, space.width_px))[: 1 if tiny else 2]

    def step(settings: StepSettings, make: Callable[[StepSettings], Workload]) -> Case:
        return Case(make(settings), make(replace(settings, gradient_checkpointing=False, optimizer=False)))

    plain, halves = StepSettings(batch), StepSettings(1, half_layers=True)
    cases = [Case(training_workloads.renderer_denoising(architecture, 2 if tiny else 16, sizes))]
    for height, width in shapes:
        for frozen in (True, False):
            cases.append(
                step(
                    plain,
                    lambda s, h=height, w=width, f=frozen: training_workloads.autoencoder_step(
                        architecture, s, h, w, decoder_frozen=f, sizes=sizes
                    ),
                )
            )
    cases.append(step(plain, lambda s: training_workloads.renderer_step(architecture, s, sizes=sizes)))
    frames = 3 if tiny else 128
    return [*cases, step(halves, lambda s: training_workloads.story_step(s, frames, sizes))]


def describe(workload: Workload) -> dict[str, Any]:
    """A workload's footprint as a row."""
    found = workload.footprint()
    return {"network": workload.name, "unit": workload.unit, "count": workload.count} | asdict(found)


def time_case(case: Case, device: str, repetitions: int, peak_tflops: float | None) -> dict[str, Any]:
    """Run a workload; its row."""
    workload = case.workload
    footprint, on_gpu = workload.footprint(), device.startswith("cuda")
    useful = case.useful.footprint().flops if case.useful else footprint.flops
    row: dict[str, Any] = {"network": workload.name, "unit": workload.unit, "count": workload.count}
    row |= {"parameters": footprint.parameters, "flops": footprint.flops, "expected_bytes": footprint.peak_bytes}
    torch.manual_seed(0)
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        model = workload.build(device)
        seconds = statistics.median(time_runs(lambda: workload.run(model), repetitions, on_gpu))
    except torch.OutOfMemoryError as error:
        return row | {"error": f"does not fit: {str(error).splitlines()[0]}"}
    row |= {"seconds_per_unit": seconds / workload.count, "units_per_s": workload.count / seconds}
    row |= {"tflops_per_s": footprint.flops / seconds / 1e12}
    row |= {"utilisation": useful / seconds / 1e12 / peak_tflops if peak_tflops else None}
    return row | {"peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}


def time_runs(run: Callable[[], Any], repetitions: int, on_gpu: bool) -> list[float]:
    """Seconds of each of some runs, after one that is not counted."""
    found = []
    for _ in range(1 + repetitions):
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return found[1:]


def keep_rates(device: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Add rows to the device's file of rates, in the place of earlier ones of the same networks."""
    path = rates_path(device, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text())["networks"] if path.is_file() else {}
    kept |= {row["network"]: row for row in rows if "seconds_per_unit" in row}
    path.write_text(json.dumps({"device": device, "networks": kept}, indent=1) + "\n")
    return path


def name_device(device: str) -> str:
    """As rates are kept under."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


def print_row(row: dict[str, Any]) -> None:
    """One line for people, on stderr."""
    if "error" in row:
        text = row["error"]
    elif "resident_bytes" in row:
        text = (
            f"{row['parameters']:>13,} parameters  {row['resident_bytes'] / 2**30:6.2f} GiB before, "
            f"{row['peak_bytes'] / 2**30:6.2f} GiB at most  {row['flops'] / 1e12:9.3f} TFLOP  "
            f"{' '.join(row['outputs'])}"
        )
    else:
        used = "" if row["utilisation"] is None else f"  utilisation {row['utilisation']:.0%}"
        held = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 2**30:.1f} GiB"
        text = f"{row['units_per_s']:10.2f} a second  {row['tflops_per_s']:7.1f} TFLOP/s{used}{held}"
    print(f"{row['network']:44} x{row['count']:<3} {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Time the networks, or describe them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", default="", help="beginnings of names, separated by commas; all without it")
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--folder", type=Path, default=CACHE_DIR, help="where rates are kept")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    asked = parser.parse_args(arguments)
    cases = [
        case for case in choose_cases(asked.tiny) if case.workload.name.startswith(tuple(asked.networks.split(",")))
    ]
    if not cases:
        names = ", ".join(sorted({case.workload.name for case in choose_cases(asked.tiny)}))
        parser.error(f"--networks {asked.networks!r} names none of: {names}")
    if not (asked.fake or asked.tiny) and not asked.device.startswith("cuda"):
        parser.error(f"on {asked.device!r} networks of this size would run for days: use --fake or --tiny")
    device = name_device(asked.device) if not asked.fake else "fake"
    peak = asked.peak_tflops or next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device), None)
    rows = []
    for case in cases:
        row = describe(case.workload) if asked.fake else time_case(case, asked.device, asked.repetitions, peak)
        rows.append(row)
        gc.collect()
        if asked.device.startswith("cuda") and not asked.fake:
            torch.cuda.empty_cache()
        if not asked.json:
            print_row(row)
        if not (asked.fake or asked.tiny):
            keep_rates(device, rows, asked.folder)
    result = {"device": device, "peak_tflops": peak, "networks": rows}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
