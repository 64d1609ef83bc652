"""What the heavy networks of a profile need, stage by stage: accelerator memory, arithmetic, and time.

Memory and arithmetic come from runs on fake tensors (`models.footprint`), which are kept, since they take seconds each.
Time comes from rates that `benchmarks/rates.py` measured on this device, else from arithmetic and the rate at which
this machine multiplies matrices: no network is faster than that.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.profile import Profile
from stages.trainer import TrainerConfig

if TYPE_CHECKING:
    from models.autoencoder import Architecture
    from models.footprint import Footprint
    from models.workloads import Workload

CACHE_DIR = Path("~/.cache/moviedreamer").expanduser()
MOST_PROCESSES = 1024
PROMPTS_OF_A_SCRIPT = 3
SENTENCES, ANSWER_WORDS = 12, 150
"""Of a keyframe's script, and of one answer of a chat model: what the stages ask for at most is more."""


@dataclass(frozen=True)
class Load:
    """A workload, and how often a stage runs it.

    Attributes:
        units: How many of the workload's units there are for a keyframe, or in a step of training.
    """

    workload: "Workload"
    units: float


@dataclass(frozen=True)
class StageLoad:
    """What a stage runs.

    Attributes:
        stage: Its name.
        loads: For a keyframe, or for the mean step of training.
        steps: Of training; None where work goes by keyframes.
        training: Settings of a stage that trains.
        batch: Its batch in a step.
    """

    stage: str
    loads: tuple[Load, ...]
    steps: int | None = None
    training: Any = None
    batch: int = 1


@dataclass(frozen=True)
class Need:
    """What a stage needs.

    Attributes:
        stage: Its name.
        networks: Names of what runs.
        parameters: Of all its networks.
        memory_bytes: Of each accelerator.
        unit: `keyframe` or `step`.
        flops: Floating-point operations a unit, over all accelerators.
        units: How many there are; None where no count of keyframes is given.
        hours: For all of them; None likewise.
        measured: Whether all of the time follows from measured rates; if not, it is a lower bound.
        remedy: What to do where an accelerator's memory is too small.
    """

    stage: str
    networks: list[str]
    parameters: int
    memory_bytes: int
    unit: str
    flops: float
    units: int | None
    hours: float | None
    measured: bool
    remedy: str = ""

    def describe(self) -> str:
        """In one line."""
        parts = [
            f"{len(self.networks)} network{'s' * (len(self.networks) > 1)}, {self.parameters / 1e9:.2f}B parameters",
            f"{self.memory_bytes / 2**30:.1f} GiB of accelerator memory",
            f"{self.flops / 1e12:,.4g} TFLOP a {self.unit}",
        ]
        if self.hours is not None:
            bound = "" if self.measured else "at least "
            hours = f"{self.hours:,.0f}" if self.hours >= 10 else f"{self.hours:.2g}"
            parts.append(f"{bound}{hours} h for {self.units:,} {self.unit}s")
        return ", ".join(parts)


class Footprints:
    """Footprints of workloads, kept in a file so that each is measured once.

    Args:
        path: The file.
        report: Called with a line before something is measured.
    """

    def __init__(self, path: Path, report: Callable[[str], None] = lambda line: None) -> None:
        self._path, self._report = path, report

    def __call__(self, workload: "Workload") -> "Footprint":
        from models.footprint import Footprint

        key = f"{workload.name} x{workload.count} {workload.settings} {self._version}"
        found = self._read()
        if key not in found:
            self._report(f"measuring {workload.name} on fake tensors")
            kept = {name: value for name, value in found.items() if name.endswith(self._version)}
            found = kept | {key: asdict(workload.footprint())}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(found, indent=1) + "\n")
        return Footprint(**found[key])

    @cached_property
    def _version(self) -> str:
        """Of all that a footprint follows from: the libraries, and our own models."""
        import models

        digest = hashlib.sha256()
        for path in sorted(Path(models.__path__[0]).glob("*.py")):
            digest.update(path.read_bytes())
        for name in ("torch", "transformers", "diffusers"):
            digest.update(importlib.metadata.version(name).encode())
        return digest.hexdigest()[:12]

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}


def examine_needs(
    profile: Profile,
    keyframes: int | None,
    accelerator_bytes: int | None,
    footprints: Callable[["Workload"], "Footprint"],
    rates: dict[str, float],
    flops_per_s: Callable[[], float],
) -> Iterator[Need]:
    """What each stage with heavy networks needs, in the order of the stages.

    Args:
        profile: The settings.
        keyframes: How many there are to work on, or to make.
        accelerator_bytes: Memory of this machine's accelerator; None where there is none.
        footprints: Gives a workload's.
        rates: Measured seconds a unit, by workload.
        flops_per_s: Gives the rate of matrix products on this machine; asked for only where a rate is missing.
    """
    for stage in stage_loads(profile):
        sizes = [footprints(load.workload) for load in stage.loads]
        need = _measure_stage(stage, sizes, keyframes, rates, flops_per_s)
        if accelerator_bytes is not None and need.memory_bytes > accelerator_bytes:
            need = replace(need, remedy=_find_remedy(stage, sizes, accelerator_bytes))
        yield need


def _measure_stage(
    stage: StageLoad,
    sizes: list["Footprint"],
    keyframes: int | None,
    rates: dict[str, float],
    flops_per_s: Callable[[], float],
) -> Need:
    flops = [load.units * size.flops / load.workload.count for load, size in zip(stage.loads, sizes, strict=True)]
    units = keyframes if stage.steps is None else stage.steps
    names = [load.workload.name for load in stage.loads]
    measured = all(name in rates for name in names)
    hours = None
    if units is not None:
        seconds = sum(
            load.units * rates[load.workload.name] if load.workload.name in rates else work / flops_per_s()
            for load, work in zip(stage.loads, flops, strict=True)
        )
        hours = units * seconds / 3600 / (1 if stage.training is None else stage.training.processes)
    networks = {load.workload.network or load.workload.name: s for load, s in zip(stage.loads, sizes, strict=True)}
    parameters = sum(size.parameters for size in networks.values())
    if stage.training is None:
        memory = sum(size.parameter_bytes for size in networks.values()) + max(size.working_bytes for size in sizes)
    else:
        memory = max(_training_memory(size, stage.training.processes) for size in sizes)
    unit = "keyframe" if stage.steps is None else "step"
    return Need(stage.stage, list(networks), parameters, memory, unit, sum(flops), units, hours, measured)


def _training_memory(size: "Footprint", processes: int, share: float = 1.0) -> int:
    """Of each process, with a share of the micro-batch's activations."""
    from models.footprint import sharded_bytes

    gathered = size.gathered_bytes if processes > 1 else 0
    return sharded_bytes(size.state_bytes, gathered, round(size.working_bytes * share), processes)


def _find_remedy(stage: StageLoad, sizes: list["Footprint"], room: int) -> str:
    """The smallest change of settings under which the stage fits into the memory that there is."""
    if stage.training is None:
        batch = {"captions": "concurrency", "scripts": "concurrency", "render": "batch_pictures",
                 "features": "batch_pictures"}.get(stage.stage)  # fmt: skip
        smaller = f"lower {stage.stage}.{batch}, or " if batch else ""
        return f"{smaller}run it on an accelerator with more memory than {room / 2**30:.0f} GiB"
    now = stage.training.micro_batches
    processes = stage.training.processes
    while processes <= MOST_PROCESSES:
        for parts in (parts for parts in range(now, stage.batch + 1) if stage.batch % parts == 0):
            if parts % processes == 0 and max(_training_memory(s, processes, now / parts) for s in sizes) <= room:
                return _name_settings(stage, processes, parts)
        processes += 1
    fewest = next((p for p in range(1, MOST_PROCESSES) if _fits(sizes, p, now / stage.batch, room)), None)
    if fewest is None:
        return f"train it on accelerators with more memory than {room / 2**30:.0f} GiB"
    return f"train it on at least {fewest} accelerators: set {stage.stage}.processes, and raise its batch as far"


def _fits(sizes: list["Footprint"], processes: int, share: float, room: int) -> bool:
    return max(_training_memory(size, processes, share) for size in sizes) <= room


def _name_settings(stage: StageLoad, processes: int, parts: int) -> str:
    wanted = {"processes": processes, "micro_batches": parts}
    changed = [name for name in wanted if wanted[name] != getattr(stage.training, name)]
    return "set " + " and ".join(f"{stage.stage}.{name}={wanted[name]}" for name in changed)


def stage_loads(profile: Profile) -> list[StageLoad]:
    """What each stage runs of networks whose size is known; stages with light networks alone are left out."""
    from models.published_sizes import PUBLISHED

    configs = {name: getattr(profile, name) for name in type(profile).model_fields}
    if not any(set(PUBLISHED) & set(c.weights()) for c in configs.values() if hasattr(c, "weights")):
        return []  # and no network's library is imported
    found = [StageLoad(name, tuple(choose(profile))) for name, choose in _INFERENCE.items()]
    found += [*_train_autoencoder(profile), *_train_renderer(profile), *_train_autoregressive(profile)]
    order = list(configs)
    return sorted((stage for stage in found if stage.loads), key=lambda stage: order.index(stage.stage))


def _people(profile: Profile) -> Iterator[Load]:
    from models import workloads

    config = profile.people
    if config.detector != "ssdlite" and config.detector_weights == "grounding_dino":
        yield Load(workloads.grounding_dino(), 1)
    if config.masks == "sam2" == config.mask_weights:
        yield Load(workloads.sam2(boxes=config.max_people), 1)


def _faces(profile: Profile) -> Iterator[Load]:
    from models import workloads

    if "farl" in profile.faces.weights():
        yield Load(workloads.farl(), 1)


def _captions(profile: Profile) -> Iterator[Load]:
    yield from _ask(profile.captions, 1, pictures=True)


def _scripts(profile: Profile) -> Iterator[Load]:
    yield from _ask(profile.scripts, PROMPTS_OF_A_SCRIPT, pictures=False)


def _ask(config: Any, questions: int, pictures: bool) -> Iterator[Load]:
    from models import workloads

    for name in set(config.weights()) & set(workloads.CHAT_MODELS):
        if name == config.model:
            yield Load(workloads.chat_prompt(name, requests=config.concurrency, pictures=pictures), questions)
            yield Load(workloads.chat_word(name, requests=config.concurrency), questions * ANSWER_WORDS)


def _features(profile: Profile) -> Iterator[Load]:
    from models import workloads
    from models.feature_table import VIEWS

    config = profile.features
    crops = VIEWS * config.crops_per_keyframe
    if config.image_encoder == "clip_vit_l14":
        yield Load(workloads.clip_patches(pictures=config.batch_pictures), VIEWS + crops)
    if config.vae == "sdxl":
        yield Load(workloads.vae_encode(height=config.height_px, width=config.width_px), VIEWS)
        if crops:
            yield Load(workloads.vae_encode(height=config.crop_px, width=config.crop_px), crops)


def _tokenize(profile: Profile) -> Iterator[Load]:
    from models import workloads

    if profile.tokenize.text_encoder == "longclip_l":
        yield Load(workloads.longclip(), SENTENCES)


def _story(profile: Profile, window_frames: int) -> Iterator[Load]:
    from models import training_workloads

    if _has_story_model(profile):
        yield Load(training_workloads.story_frame(window_frames - 1), 1)


def _score(profile: Profile) -> Iterator[Load]:
    yield from _story(profile, profile.score.window_frames)


def _dream(profile: Profile) -> Iterator[Load]:
    from models import workloads

    yield from _story(profile, profile.dream.window_frames)
    if profile.dream.text_encoder == "longclip_l":
        yield Load(workloads.longclip(), SENTENCES)


def _render(profile: Profile) -> Iterator[Load]:
    from models import training_workloads, workloads

    if profile.train_autoencoder.pretrained == "sdxl" and (architecture := _architecture(profile)):
        steps, pictures = profile.render.sampling_steps, profile.render.batch_pictures
        yield Load(training_workloads.renderer_denoising(architecture, pictures), steps)
        yield Load(workloads.vae_decode(height=profile.features.height_px, width=profile.features.width_px), 1)


def _animate(profile: Profile) -> Iterator[Load]:
    from models import workloads

    if "svd_xt" in profile.animate.weights():
        yield Load(workloads.svd_image_encoder(), 1)
        yield Load(workloads.svd_unet(), 25)
        yield Load(workloads.svd_decode(), 25)


def _evaluate(profile: Profile) -> Iterator[Load]:
    from models import workloads

    if "clip_vit_l14" in profile.evaluate.weights():
        yield Load(workloads.clip(), 1)


_INFERENCE: dict[str, Callable[[Profile], Iterator[Load]]] = {
    "people": _people,
    "faces": _faces,
    "captions": _captions,
    "scripts": _scripts,
    "features": _features,
    "tokenize": _tokenize,
    "score": _score,
    "dream": _dream,
    "render": _render,
    "animate": _animate,
    "evaluate": _evaluate,
}


def _architecture(profile: Profile) -> "Architecture | None":
    """The autoencoder's, where its frozen models' sizes are known."""
    from models.autoencoder import Architecture
    from models.training_workloads import published_space

    config = profile.features
    if (config.image_encoder, config.vae) != ("clip_vit_l14", "sdxl"):
        return None
    space = published_space(height_px=config.height_px, width_px=config.width_px, crop_px=config.crop_px)
    patches = (config.encoder_height_px // 14) * (config.encoder_width_px // 14)
    return Architecture.from_settings(profile.train_autoencoder, replace(space, patches=patches))


def _has_story_model(profile: Profile) -> bool:
    config = profile.train_autoregressive
    return config.trunk == "llama2_7b" and config.layers is None


def _step_settings(config: Any, batch: int) -> Any:
    from models.training_workloads import StepSettings

    return StepSettings(
        batch=batch // config.micro_batches,
        precision=config.precision,
        gradient_checkpointing=config.gradient_checkpointing,
        optimizer=False,
        half_layers=config.processes > 1 and config.precision == "bfloat16",
    )


def _train_autoencoder(profile: Profile) -> Iterator[StageLoad]:
    from models.training_workloads import autoencoder_step

    config, features = profile.train_autoencoder, profile.features
    architecture = _architecture(profile)
    if config.pretrained != "sdxl" or architecture is None:
        return
    phases = (config.image_phase, (features.crop_px,) * 2), (config.film_phase, (features.height_px, features.width_px))
    total, loads = sum(phase.steps for phase, _ in phases), []
    for phase, shape in phases:
        frozen = min(phase.compressor_steps, phase.steps)
        settings = _step_settings(config, phase.batch_size)
        for steps, is_frozen in ((frozen, True), (phase.steps - frozen, False)):
            if steps:
                workload = autoencoder_step(
                    architecture, settings, *shape, decoder_frozen=is_frozen, average_decay=config.average_decay
                )
                loads.append(Load(workload, phase.batch_size * steps / total))
    yield _trains("train_autoencoder", loads, total, config, min(phase.batch_size for phase, _ in phases))


def _train_renderer(profile: Profile) -> Iterator[StageLoad]:
    from models.training_workloads import renderer_step

    config, architecture = profile.train_renderer, _architecture(profile)
    if profile.train_autoencoder.pretrained == "sdxl" and architecture is not None:
        workload = renderer_step(architecture, _step_settings(config, config.batch_size), config.average_decay)
        loads = [Load(workload, config.batch_size)]
        yield _trains("train_renderer", loads, config.steps, config, config.batch_size)


def _train_autoregressive(profile: Profile) -> Iterator[StageLoad]:
    from models.training_workloads import story_step

    config = profile.train_autoregressive
    if _has_story_model(profile):
        workload = story_step(_step_settings(config, config.batch_windows), config.window_frames)
        loads = [Load(workload, config.batch_windows)]
        yield _trains("train_autoregressive", loads, config.steps, config, config.batch_windows)


def _trains(stage: str, loads: list[Load], steps: int, config: TrainerConfig, batch: int) -> StageLoad:
    return StageLoad(stage, tuple(loads), steps, config, batch)


def read_rates(device: str, folder: Path) -> dict[str, float]:
    """Seconds a unit by workload, as `benchmarks/rates.py` measured them on a device; none where it did not run."""
    path = rates_path(device, folder)
    try:
        return {name: row["seconds_per_unit"] for name, row in json.loads(path.read_text())["networks"].items()}
    except (OSError, ValueError, KeyError):
        return {}


def rates_path(device: str, folder: Path) -> Path:
    """Where rates on a device are kept."""
    return folder / "rates" / f"{''.join(c if c.isalnum() else '-' for c in device)}.json"


def measure_flops(device: str, seconds: float = 0.3) -> float:
    """Floating-point operations a second of large matrix products here: in half precision on an accelerator."""
    import torch

    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    left = torch.randn(side, side, device=device, dtype=dtype)

    def multiply() -> float:
        started = time.perf_counter()
        result = left @ left
        result[0, 0].item()  # waits for the accelerator
        return time.perf_counter() - started

    best, until = multiply(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, multiply())
    return 2 * side**3 / best
