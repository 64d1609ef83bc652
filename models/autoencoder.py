"""The diffusion autoencoder: picture -> 2 tokens -> picture.

Frozen image encoder, transformer compressor, and a UNet that denoises latents under the tokens' condition.

Dimensions: batch; height, width in pixels; patch = patches of the image encoder; feature = its width; token = 2;
dim = width of a token; channel, row, column of a latent; context = cross-attention entries; cross = their width.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from models import weights
from models.autoencoder_sizes import Architecture
from models.diffusion import NoiseSchedule, add_token_noise
from models.feature_table import FeatureSpace, FeatureTable, FrozenModels
from models.latents import cover
from models.processes import Precision, autocast
from models.sdxl_decoder import SdxlDecoder, describe_unet, load_unet
from models.small_decoder import SmallDecoder

FITTED_VIEWS = 2000
"""Views on which features and latents are measured."""


class Compressor(nn.Module):
    """Patch features to a few tokens of zero mean and unit variance each.

    Three transformer blocks over the patches, a linear mix over positions, three blocks over the tokens.

    Source: figure 8 and appendix A; the last normalisation is ours: tokens of a fixed scale suit the mixture head.
    """

    def __init__(self, architecture: Architecture):
        super().__init__()
        width, patches, feature_dim = (
            architecture.compressor_width, architecture.space.patches, architecture.space.feature_dim
        )  # fmt: skip
        self.register_buffer("feature_mean", torch.zeros(patches, feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.project_in = nn.Linear(feature_dim, width)
        self.patch_blocks = _blocks(width, architecture.compressor_heads)
        self.mix_positions = nn.Linear(patches, architecture.tokens)
        self.token_blocks = _blocks(width, architecture.compressor_heads)
        self.project_out = nn.Linear(width, architecture.token_dim)

    def fit(self, features: Float[Tensor, "batch patch feature"]) -> None:
        """Measure the mean and the scale of features on training pictures.

        Frames of one shot have nearly the same features, and a few of their channels are far larger than all others:
        without this, telling such frames apart takes many times the training.
        """
        self.feature_mean.copy_(features.mean(dim=0))
        self.feature_std.copy_((features - self.feature_mean).std(dim=(0, 1)).clamp(min=1e-3))

    def forward(self, features: Float[Tensor, "batch patch feature"]) -> Float[Tensor, "batch token dim"]:
        """Compress the image encoder's features."""
        hidden = self.patch_blocks(self.project_in((features - self.feature_mean) / self.feature_std))
        hidden = self.mix_positions(hidden.transpose(1, 2)).transpose(1, 2)
        tokens = self.project_out(self.token_blocks(hidden))
        return functional.layer_norm(tokens, tokens.shape[-1:])


def sharded_parts(decoder: SmallDecoder | SdxlDecoder) -> list[nn.Module]:
    """The parts of a decoder that several processes gather one at a time."""
    return [*decoder.unet.down_blocks, decoder.unet.mid_block, *decoder.unet.up_blocks]


class Autoencoder(nn.Module):
    """Picture to tokens and back. The frozen models are no part of its parameters.

    Args:
        architecture: Sizes.
        weights_dir: Folder of pulled weights; None for the default one.
        device: Where its frozen models run.
        trained: Whether weights are to be loaded into it: SDXL's own are not read then.

    Raises:
        weights.WeightsError: Weights that the architecture names are not here.
    """

    def __init__(
        self, architecture: Architecture, weights_dir: Path | None = None, device: str = "cpu", trained: bool = False
    ):
        super().__init__()
        a = self.architecture = architecture
        self.device = device
        self.frozen = FrozenModels(a.space, weights_dir, device)
        self.latents = a.space.open_latents(a.flattening, weights_dir, device)
        self.compressor = Compressor(a)
        self.schedule = NoiseSchedule(a.timesteps, a.prediction)
        if a.pretrained is None:
            self.decoder: SmallDecoder | SdxlDecoder = SmallDecoder(a, self.schedule)
        else:
            folder = weights.locate(a.pretrained, weights_dir)
            self.decoder = SdxlDecoder(a, describe_unet(folder) if trained else load_unet(folder))

    def extract_features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patch feature"]:
        """The frozen encoder's features of RGB pictures in 0..1, all of them scaled to the encoder's size."""
        return self.frozen.extract_features(images)

    def fit(self, table: FeatureTable) -> None:
        """Measure, on some of the training views, what normalises features and latents, and what a draft is made of."""
        views = table.training_views()
        views = views[:: -(-len(views) // FITTED_VIEWS)]
        features, latents = table.features(views).to(self.device), table.latents(views).to(self.device)
        with torch.no_grad():
            self.latents.fit(latents)
            self.compressor.fit(features)
            if isinstance(self.decoder, SmallDecoder) and self.decoder.draft is not None:
                self.decoder.draft.fit(self.latents.normalize(latents))

    def loss(
        self,
        features: Float[Tensor, "batch patch feature"],
        latents: Float[Tensor, "batch channel row column"],
        noise_offset: float,
        token_noise: float,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Equation 1 of pictures.

        Args:
            features: Of the frozen encoder.
            latents: Before normalisation.
            noise_offset: See `NoiseSchedule.loss`.
            token_noise: Largest standard deviation of noise on the tokens.
            generator: Of all that is random.
        """
        tokens = add_token_noise(self.compressor(features), token_noise, generator)
        return self.schedule.loss(
            lambda noisy, steps: self.decoder(noisy, steps, tokens),
            self.latents.normalize(latents),
            noise_offset,
            generator,
        )

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch token dim"]:
        """Tokens of RGB pictures in 0..1 of any size; each token has zero mean and unit variance over its dim numbers.

        What lies outside the decoder's shape, around the middle, is not seen: see `models.latents.cover`.
        """
        covered = cover(images.to(self.device), self.architecture.height_px, self.architecture.width_px)
        return self.compressor(self.extract_features(covered))

    @torch.no_grad()
    def decode(
        self,
        tokens: Float[Tensor, "batch token dim"],
        steps: int,
        seed: int,
        batch: int = 16,
        precision: Precision = "float32",
    ) -> Float[Tensor, "batch 3 height width"]:
        """RGB pictures in 0..1 of tokens, by `steps` DDIM steps; the same seed gives the same pictures."""
        batches = sample_pictures(self, self.decoder, (tokens,), steps, seed, batch, precision=precision)
        return torch.cat([made for _, made in batches])


def sample_pictures(
    model: Autoencoder,
    denoiser: Callable[..., Tensor],
    conditions: Sequence[Tensor],
    steps: int,
    seed: int,
    batch: int,
    scheduler: str = "DDIMScheduler",
    precision: Precision = "float32",
    done: Callable[[range], bool] = lambda places: False,
) -> Iterator[tuple[range, Float[Tensor, "batch 3 height width"]]]:
    """RGB pictures in 0..1, a batch at a time, on the CPU, each with its places.

    Args:
        model: Gives the schedule and the latents.
        denoiser: Called as `denoiser(noisy, timesteps, *conditions)`.
        conditions: Tensors with one entry a picture.
        steps: Denoising steps.
        seed: Of all noise. That of a picture depends on the seed and its place only, whatever the batch.
        batch: Pictures at once.
        scheduler: A class of diffusers.
        precision: Of the denoiser; steps between its answers are taken in float32 either way.
        done: Whether the pictures of some places are there already, and not wanted again.

    Raises:
        SamplerError: The scheduler cannot sample from the model.
    """
    count = len(conditions[0])
    noise = draw_noise(model, count, seed)
    for first in range(0, count, batch):
        places = range(first, min(first + batch, count))
        if done(places):
            continue
        parts = [condition[places.start : places.stop] for condition in conditions]

        def denoise(noisy: Tensor, timesteps: Tensor, parts: list[Tensor] = parts) -> Tensor:
            with autocast(noisy.device.type, precision):
                return denoiser(noisy, timesteps, *parts)

        seeds = [(seed * 1_000_003 + place + 1) % 2**63 for place in places]
        start = noise[places.start : places.stop].to(conditions[0])
        with torch.no_grad():
            latents = model.schedule.sample(denoise, start, steps, scheduler, seeds)
            yield places, model.latents.decode(latents).cpu()


def draw_noise(model: Autoencoder, count: int, seed: int) -> Float[Tensor, "batch channel row column"]:
    """The starting noise of `count` pictures: the noise of each depends on the seed and its place only."""
    space = model.architecture.space
    shape = (count, *space.latent_shape(space.height_px, space.width_px))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save_autoencoder(model: Autoencoder, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write `model.safetensors` (without the frozen models) and `config.json`.

    Args:
        model: Its sizes are kept.
        folder: Where the files go.
        state: Its state dict, where it lies in several processes; None takes the model's own.
    """
    state = model.state_dict() if state is None else state
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(model.architecture), indent=2) + "\n")


def read_architecture(path: Path) -> Architecture:
    """The sizes in a config.json that `save_autoencoder` wrote."""
    settings = json.loads(path.read_text())
    space = FeatureSpace(**settings.pop("space"))
    return Architecture(**{**settings, "space": space, "channels": tuple(settings["channels"])})


def load_autoencoder(paths: Sequence[Path], weights_dir: Path | None = None, device: str = "cpu") -> Autoencoder:
    """Read an autoencoder from the files of its artifact, in any order.

    Raises:
        ValueError: One of the two files is not among them.
    """
    by_name = {path.name: path for path in paths}
    for name in ("config.json", "model.safetensors"):
        if name not in by_name:
            raise ValueError(f"autoencoder has no {name} among {sorted(by_name)}: train it again")
    architecture = read_architecture(by_name["config.json"])
    model = Autoencoder(architecture, weights_dir, device, trained=True)
    state = load_file(by_name["model.safetensors"])
    missing, unexpected = model.load_state_dict(state, strict=False, assign=architecture.pretrained is not None)
    if wrong := missing + unexpected:
        raise ValueError(f"autoencoder weights do not fit its config.json: {wrong[:5]}; train it again")
    return model.eval().to(device)


def _blocks(width: int, heads: int) -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, num_layers=3, enable_nested_tensor=False)
