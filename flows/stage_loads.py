"""Which large networks each stage runs under a profile, on what, and how often."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flows.profile import Profile

if TYPE_CHECKING:
    from models.autoencoder_sizes import Architecture
    from models.processes import Precision
    from models.workloads import Workload

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


def _story(profile: Profile, window_frames: int, precision: "Precision") -> Iterator[Load]:
    from models import training_workloads

    if _has_story_model(profile):
        yield Load(training_workloads.story_frame(window_frames - 1, precision=precision), 1)


def _score(profile: Profile) -> Iterator[Load]:
    yield from _story(profile, profile.score.window_frames, "float32")


def _dream(profile: Profile) -> Iterator[Load]:
    from models import workloads

    yield from _story(profile, profile.dream.window_frames, profile.dream.precision)
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
        svd = profile.animate.svd
        clips = svd.clips_in(profile.animate.seconds_per_keyframe)
        size = {"height": svd.height_px, "width": svd.width_px}
        yield Load(workloads.svd_image_encoder(), 1 + clips)  # the keyframe, and each clip's last frame
        yield Load(workloads.svd_unet(frames=svd.frames, **size), clips * svd.steps)
        yield Load(workloads.svd_decode(frames=min(svd.decode_frames, svd.frames), **size), clips * svd.frames)


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
    from models.autoencoder_sizes import Architecture
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


def _trains(stage: str, loads: list[Load], steps: int, config: Any, batch: int) -> StageLoad:
    return StageLoad(stage, tuple(loads), steps, config, batch)
