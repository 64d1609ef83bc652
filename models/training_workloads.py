"""Steps of training at the paper's size, and the trained models at work: a frame, a picture; see `models.workloads`.

A step is the trainers' own: the models' losses under autocast, gradients, and `TrainingRun`'s optimizer. What a process
keeps all the time follows from counts (`models.footprint`), so that for memory it is enough to run a micro-batch whose
gradients go as soon as they are there.

Dimensions: batch; position = place in a sequence; channel, row, column of a latent.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import DynamicCache

from models.autoencoder import Autoencoder, Compressor, sharded_parts
from models.autoencoder_sizes import Architecture
from models.autoregressive import AutoregressiveConfig, AutoregressiveModel, halve_trunk
from models.feature_table import FeatureSpace
from models.footprint import FLOAT32, gathered_bytes, state_bytes
from models.image_encoder import count_patches
from models.language_model import build_language_model
from models.processes import Precision, autocast
from models.published_sizes import PUBLISHED, Sizes
from models.renderer import SAVED, Renderer
from models.sdxl_decoder import SdxlDecoder
from models.sequence import Kind, SequenceBatch
from models.training import TrainingRun
from models.variational_latents import VariationalLatents
from models.workloads import Workload

FRAME = (
    Kind.START_OF_FRAME, *[Kind.WORD] * 10, *[Kind.SENTENCE] * 15, *[Kind.FACE] * 2, Kind.END_OF_FRAME,
    *[Kind.TOKEN] * 2,
)  # fmt: skip
"""A frame of 31 positions, so that 128 of them, and ten references of two tokens, fit LLaMA2's 4096 positions."""


TOKEN_DIM = 256
"""Width of a frame token, where settings give no other."""


@dataclass(frozen=True)
class StepSettings:
    """How a training step runs.

    Attributes:
        batch: Sequences or pictures of one micro-batch.
        precision: Of matrix products.
        gradient_checkpointing: Activations are computed twice in place of being kept.
        optimizer: Whether a step ends with the optimizer's; if not, gradients go as soon as they are there.
        half_layers: Layers are in half precision: as each of several processes gathers them. With an optimizer, whose
            state then is in half precision too, it is not how the project trains, but a step of the same arithmetic
            that one accelerator of 80 GB holds.
    """

    batch: int = 1
    precision: Precision = "bfloat16"
    gradient_checkpointing: bool = True
    optimizer: bool = True
    half_layers: bool = False


class Training(nn.Module):
    """A model and one step of its training.

    Args:
        model: What is trained; `layers` are the parts that several processes gather one at a time.
        layers: They.
        choose: Gives the trained parameters, by name, in groups; those that ask for no gradient now are left alone.
        loss: Gives the loss of a micro-batch.
        settings: How.
        average_decay: As of `TrainingRun`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        choose: Callable[[], list[dict[str, nn.Parameter]]],
        loss: Callable[[], Tensor],
        settings: StepSettings,
        average_decay: float | None = None,
    ) -> None:
        super().__init__()
        self.model, self._loss, self._run = model, loss, None
        layers, weights = list(layers), dict(model.named_parameters())
        largest = max(_count(layer.parameters()) for layer in layers)
        rest = _count(weights.values()) - sum(_count(layer.parameters()) for layer in layers)
        self.gathered = gathered_bytes(largest, rest, settings.precision)
        if settings.half_layers:
            for layer in layers:
                layer.to(torch.bfloat16)
        groups = choose()
        averaged = [p for group in groups for p in group.values()]
        trained = [p for p in averaged if p.requires_grad]
        self.states = state_bytes(_count(trained), _count(weights.values()) - _count(trained))
        self.states += FLOAT32 * _count(averaged) if average_decay is not None else 0
        if not settings.optimizer:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
            return
        self._run = TrainingRun(*groups, seed=0, average_decay=average_decay)
        for parameter in trained:  # a first step along no gradient, after which all of the optimizer's state is there
            parameter.grad = torch.zeros_like(parameter)
        self._run.take_step(*[0.0] * len(groups))

    def forward(self) -> Tensor:
        """One step on one micro-batch."""
        loss = self._loss()
        if self._run is None:
            loss.backward()
        else:
            self._run.update(loss, *[1e-6] * len(self._run.optimizer.param_groups))
        return loss.detach()


def _step(training: Training) -> Tensor:
    return training()


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def published_space(
    sizes: Sizes = PUBLISHED, height_px: int = 512, width_px: int = 896, crop_px: int = 768
) -> FeatureSpace:
    """The feature space of CLIP's patches and SDXL's latents."""
    vision, vae = sizes["clip_vit_l14"]["vision"], sizes["sdxl"]["vae"]
    side = vision["image_size"]
    return FeatureSpace(
        image_encoder="clip_vit_l14", encoder_height_px=side, encoder_width_px=side,
        patches=count_patches(side, side, vision["patch_size"]), feature_dim=vision["hidden_size"], vae="sdxl",
        block_px=2 ** (len(vae["block_out_channels"]) - 1), luma=0, chroma=0, latent_channels=vae["latent_channels"],
        height_px=height_px, width_px=width_px, crop_px=crop_px,
    )  # fmt: skip


class _Trained(nn.Module):
    """What of an `Autoencoder` training reaches: without the frozen models, so that no weights have to be there."""

    loss = Autoencoder.loss

    def __init__(self, architecture: Architecture, sizes: Sizes) -> None:
        super().__init__()
        from models.diffusion import NoiseSchedule

        self.architecture = architecture
        self.compressor = Compressor(architecture)
        self.schedule = NoiseSchedule(architecture.timesteps, architecture.prediction)
        self.latents = VariationalLatents(folder=None)  # never loaded: SDXL's latents are taken as they are
        self.decoder = SdxlDecoder(architecture, UNet2DConditionModel(**sizes["sdxl"]["unet"]))


def autoencoder_step(
    architecture: Architecture,
    settings: StepSettings,
    height: int,
    width: int,
    decoder_frozen: bool = False,
    average_decay: float = 0.9999,
    sizes: Sizes = PUBLISHED,
) -> Workload:
    """A step of compressor and SDXL's UNet, or of the compressor alone through the frozen UNet."""
    space = architecture.space

    def build(device: str) -> nn.Module:
        with torch.device(device):
            parts = _Trained(architecture, sizes)
        parts.decoder.requires_grad_(not decoder_frozen)
        if settings.gradient_checkpointing:
            parts.decoder.unet.enable_gradient_checkpointing()

        def loss() -> Tensor:
            features = torch.randn(settings.batch, space.patches, space.feature_dim, device=device)
            latents = torch.randn(settings.batch, *space.latent_shape(height, width), device=device)
            with autocast(device, settings.precision):
                return parts.loss(features, latents, 0.05, 0.0, torch.Generator())

        def choose() -> list[dict[str, nn.Parameter]]:
            return [dict(parts.named_parameters())]

        return Training(parts, sharded_parts(parts.decoder), choose, loss, settings, average_decay)

    name = f"sdxl {'compressor' if decoder_frozen else 'decoder'} training {width}x{height}"
    return Workload(name, "picture", settings.batch, build, _step, repr(settings), "sdxl unet")


def _context(renderer: Renderer, batch: int, device: str) -> list[Tensor]:
    a, sizes = renderer.autoencoder.architecture, renderer.sizes
    shapes = (
        (a.tokens, a.token_dim),
        (sizes["max_sentences"], sizes["text_dim"]),
        (sizes["max_faces"], sizes["face_dim"]),
    )
    return [torch.randn(batch, *shape, device=device) for shape in shapes]


def _build_renderer(architecture: Architecture, sizes: Sizes, device: str) -> Renderer:
    widths = sizes["longclip_l"]["text"]["projection_dim"], sizes["farl"]["vision"]["projection_dim"]
    with torch.device(device):
        return Renderer(_Trained(architecture, sizes), *widths, max_sentences=15, max_faces=5)


def renderer_step(
    architecture: Architecture, settings: StepSettings, average_decay: float = 0.9999, sizes: Sizes = PUBLISHED
) -> Workload:
    """A step of the ID-preserving decoder, its context of 22 entries."""
    space = architecture.space

    def build(device: str) -> nn.Module:
        model = _build_renderer(architecture, sizes, device)
        if settings.gradient_checkpointing:
            model.autoencoder.decoder.unet.enable_gradient_checkpointing()

        def loss() -> Tensor:
            latents = torch.randn(settings.batch, *space.latent_shape(space.height_px, space.width_px), device=device)
            with autocast(device, settings.precision):
                return model.loss(latents, *_context(model, settings.batch, device), 0.2, 0.05, 0.0, torch.Generator())

        def choose() -> list[dict[str, nn.Parameter]]:
            return [{name: p for name, p in model.named_parameters() if name.startswith(SAVED)}]

        return Training(model, sharded_parts(model.autoencoder.decoder), choose, loss, settings, average_decay)

    return Workload(
        f"sdxl renderer training {space.width_px}x{space.height_px}",
        "picture",
        settings.batch,
        build,
        _step,
        repr(settings),
    )


def renderer_denoising(architecture: Architecture, pictures: int = 16, sizes: Sizes = PUBLISHED) -> Workload:
    """One denoising step of the renderer on a batch of pictures."""
    space = architecture.space

    @torch.no_grad()
    def run(model: Renderer) -> Tensor:
        device = str(model.align_text[0].weight.device)
        noisy = torch.randn(pictures, *space.latent_shape(space.height_px, space.width_px), device=device)
        return model(noisy, torch.ones(pictures, device=device), *_context(model, pictures, device))

    def build(device: str) -> nn.Module:
        return _build_renderer(architecture, sizes, device).eval().requires_grad_(False)

    return Workload(f"sdxl renderer denoising {space.width_px}x{space.height_px}", "picture", pictures, build, run)


def _build_story_model(sizes: Sizes, device: str) -> AutoregressiveModel:
    text, face = sizes["longclip_l"]["text"]["projection_dim"], sizes["farl"]["vision"]["projection_dim"]
    with torch.device(device):
        trunk = build_language_model(sizes["llama2_7b"]["trunk"])
        config = AutoregressiveConfig(sizes["llama2_7b"]["trunk"], 2, TOKEN_DIM, text, face)
        return AutoregressiveModel(config, trunk, Tokenizer(BPE()))


def _make_sequences(model: AutoregressiveModel, frames: int, count: int, references: int = 10) -> SequenceBatch:
    config, device = model.config, model.token_mean.device
    kinds = [Kind.REFERENCE] * (config.tokens_per_frame * references) + list(FRAME) * frames
    rows = {kind: count * kinds.count(kind) for kind in Kind}

    def draw(number: int, width: int) -> Tensor:
        return torch.randn(number, width, device=device)

    return SequenceBatch(
        torch.tensor([[int(kind) for kind in kinds]] * count, device=device),
        torch.zeros(count, len(kinds), dtype=torch.long, device=device),
        draw(rows[Kind.SENTENCE], config.text_width),
        draw(rows[Kind.FACE], config.face_width),
        draw(rows[Kind.TOKEN] + rows[Kind.REFERENCE], config.token_dim),
    )


def story_step(settings: StepSettings, frames: int = 128, sizes: Sizes = PUBLISHED) -> Workload:
    """A step of the story model on sequences of keyframes after ten references."""

    def build(device: str) -> nn.Module:
        model = _build_story_model(sizes, device).train()
        model.precision = settings.precision
        if settings.gradient_checkpointing:
            model.trunk.activation_checkpointing_enable()

        def loss() -> Tensor:
            return model.losses(_make_sequences(model, frames, settings.batch)).total

        def choose() -> list[dict[str, nn.Parameter]]:
            return [model.new_parameters(), model.trunk_parameters()]

        return Training(model, model.trunk.layers, choose, loss, settings)

    name = f"llama2_7b training {frames} frames"
    return Workload(name, "sequence", settings.batch, build, _step, repr(settings), "llama2_7b")


def story_frame(frames: int = 127, sizes: Sizes = PUBLISHED, precision: Precision = "bfloat16") -> Workload:
    """The story model makes the last frame of a full window with a cache that grows, its trunk in a precision.

    `models.generation` keeps keys and values in tensors of a fixed size instead, and does the same arithmetic on them.
    """

    @torch.no_grad()
    def run(model: AutoregressiveModel) -> Tensor:
        if not hasattr(model, "read"):
            model.read = _fill_cache(model, frames)
            model.positions = model.read.get_seq_length()
        elif added := model.read.get_seq_length() - model.positions:
            model.read.crop(-added)
        return _read_on(model, model.read)

    def build(device: str) -> nn.Module:
        model = _build_story_model(sizes, device).eval().requires_grad_(False)
        return halve_trunk(model) if precision == "bfloat16" else model

    return Workload("llama2_7b frame", "frame", 1, build, run, precision, "llama2_7b")


def _fill_cache(model: AutoregressiveModel, frames: int) -> DynamicCache:
    """Keys and values of frames that were read."""
    device, config = model.token_mean.device, model.trunk.config
    positions = _make_sequences(model, frames, 1).kinds.shape[1]
    shape = 1, config.num_key_value_heads, positions, config.hidden_size // config.num_attention_heads
    cache, dtype = DynamicCache(config=config), model.trunk.dtype
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)), layer)
    return cache


def _read_on(model: AutoregressiveModel, cache: DynamicCache) -> Tensor:
    """A script, then each token of a frame after the one before it."""
    device, config = model.token_mean.device, model.config
    inputs = torch.randn(1, len(FRAME) - config.tokens_per_frame, model.trunk.config.hidden_size, device=device)
    tokens = []
    for _ in range(config.tokens_per_frame):
        read = inputs.to(model.trunk.dtype)
        hidden = model.trunk(inputs_embeds=read, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        tokens.append(model.mixture(hidden.float(), torch.zeros(1, config.token_dim, device=device)).mean())
        inputs = model.token_projection(tokens[-1]).unsqueeze(0)
    return torch.cat(tokens)
