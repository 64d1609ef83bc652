"""The diffusion autoencoder: picture -> 2 tokens -> picture.

Frozen image encoder, transformer compressor, and a UNet that denoises latents under the tokens' condition.

Dimensions: batch; height, width in pixels; patch = patches of the image encoder; feature = its width; token = 2;
dim = width of a token; channel, row, column of a latent; context = cross-attention entries; cross = their width.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from models.diffusion import NoiseSchedule, Prediction
from models.image_encoder import DinoV2
from models.latents import BlockCosineTransform, cover, scale_pictures

SPREAD_START = -0.25  # a variance of exp(-1): drafts are poor at first


@dataclass(frozen=True)
class Architecture:
    """Sizes of a diffusion autoencoder, kept beside its weights.

    Attributes:
        height_px, width_px: Pictures it gives.
        encoder_height_px, encoder_width_px: Pictures are scaled to this for the image encoder.
        tokens, token_dim: The compressed picture.
        compressor_width, compressor_heads: Its transformer blocks.
        block_px, luma, chroma, flattening: The latents; see `BlockCosineTransform`.
        channels: Width of the UNet at each resolution, finest first; each is half the resolution of the one before.
        layers: Residual blocks at each resolution.
        cross_dim: Width of the cross-attention context.
        heads: Attention heads of the UNet.
        norm_groups: Groups of its normalisation.
        draft_components, draft_width: Sizes of a `Draft`; 0 components for none.
        timesteps, prediction: The noise schedule.
    """

    height_px: int
    width_px: int
    encoder_height_px: int
    encoder_width_px: int
    tokens: int
    token_dim: int
    compressor_width: int
    compressor_heads: int
    block_px: int
    luma: int
    chroma: int
    flattening: float
    channels: tuple[int, ...]
    layers: int
    cross_dim: int
    heads: int
    norm_groups: int
    draft_components: int
    draft_width: int
    timesteps: int
    prediction: Prediction

    @classmethod
    def from_settings(cls, settings: Any) -> "Architecture":
        """Take the fields of the same names from a settings object."""
        values = {field.name: getattr(settings, field.name) for field in fields(cls)}
        return cls(**{**values, "channels": tuple(values["channels"])})


class Compressor(nn.Module):
    """Patch features to a few tokens of zero mean and unit variance each.

    Three transformer blocks over the patches, a linear mix over positions, three blocks over the tokens.

    Source: figure 8 and appendix A; the last normalisation is ours: tokens of a fixed scale suit the mixture head.
    """

    def __init__(self, architecture: Architecture, feature_dim: int, patches: int):
        super().__init__()
        width = architecture.compressor_width
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


class Draft(nn.Module):
    """A first guess of the whole latent from the tokens alone, which the UNet then completes.

    The guess is the mean of the training latents plus a weighted sum of their principal components. Only the weights
    are learned, from sines of mixed tokens: the optimizer takes as large steps along the small components, which
    tell the frames of one shot apart, as along the large ones. A small UNet alone took far longer to lay out pictures.

    Source: ours. Principal components of pictures as in eigenfaces; sines of inputs as in
    https://arxiv.org/abs/2006.10739.
    """

    frequency = 2.0  # at 5, guesses from slightly wrong tokens fall apart: 20 dB instead of 28 at an error of 0.2

    def __init__(self, architecture: Architecture, shape: tuple[int, int, int]):
        super().__init__()
        inputs = architecture.tokens * architecture.token_dim
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("components", torch.zeros(architecture.draft_components, *shape))
        self.mix_tokens = nn.Linear(inputs, architecture.draft_width)
        nn.init.normal_(self.mix_tokens.weight, std=self.frequency / math.sqrt(inputs))
        nn.init.uniform_(self.mix_tokens.bias, -math.pi, math.pi)
        self.weigh_components = nn.Linear(architecture.draft_width, architecture.draft_components)
        self.spread = nn.Parameter(torch.full((shape[0], 1, 1), SPREAD_START))

    def fit(self, latents: Float[Tensor, "batch channel row column"]) -> None:
        """Find the components, each scaled to its standard deviation, from at most 2000 of the training latents."""
        chosen = latents[:: math.ceil(len(latents) / 2000)]
        self.mean.copy_(chosen.mean(dim=0))
        _, scale, directions = torch.linalg.svd((chosen - self.mean).flatten(1), full_matrices=False)
        found = (directions * scale.unsqueeze(1) / math.sqrt(len(chosen)))[: len(self.components)]
        self.components.zero_()[: len(found)] = found.unflatten(1, self.mean.shape)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch channel row column"]:
        """Guess latents."""
        waves = math.sqrt(2) * torch.sin(self.mix_tokens(tokens.flatten(1)))
        return self.mean + torch.einsum("bk,kcyx->bcyx", self.weigh_components(waves), self.components)

    def predict_velocity(
        self,
        noisy: Float[Tensor, "batch channel row column"],
        draft: Float[Tensor, "batch channel row column"],
        signal: Float[Tensor, "batch 1 1 1"],
    ) -> Float[Tensor, "batch channel row column"]:
        """The best prediction if latents were Gaussian around their draft, with a learned variance for each channel.

        With x ~ N(m, s^2) and z = a x + b e, a^2 + b^2 = 1, the expected velocity a e - b x given z is
        b (a (1 - s^2) z - m) / (a^2 s^2 + b^2).

        Args:
            noisy: z.
            draft: m.
            signal: a^2 of each.
        """
        variance = torch.exp(4 * self.spread)  # four: as fast to learn as the rest
        top = signal.sqrt() * (1 - variance) * noisy - draft
        return (1 - signal).sqrt() * top / (signal * variance + 1 - signal)


class Decoder(nn.Module):
    """The denoiser: a UNet with cross-attention to the context and a projection of the tokens in its time embedding.

    Source: section 3.2 and appendix A. Attention only at the lowest resolution, where it is cheap.
    """

    def __init__(self, architecture: Architecture, latent_channels: int, schedule: NoiseSchedule):
        super().__init__()
        a = architecture
        self.project_tokens = nn.Linear(a.token_dim, a.cross_dim, bias=False)
        self.draft = None
        if a.draft_components:
            self.draft = Draft(a, (latent_channels, a.height_px // a.block_px, a.width_px // a.block_px))
            self.prediction = a.prediction
            self.register_buffer("signal", schedule.training.alphas_cumprod.clone(), persistent=False)
        finer = len(architecture.channels) - 1
        self.unet = UNet2DConditionModel(
            in_channels=latent_channels * (2 if self.draft else 1),
            out_channels=latent_channels,
            block_out_channels=architecture.channels,
            layers_per_block=architecture.layers,
            down_block_types=("DownBlock2D",) * finer + ("CrossAttnDownBlock2D",),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * finer,
            cross_attention_dim=architecture.cross_dim,
            attention_head_dim=architecture.heads,
            norm_num_groups=architecture.norm_groups,
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=architecture.tokens * architecture.token_dim,
            resnet_time_scale_shift="scale_shift",
        ).to(memory_format=torch.channels_last)
        if self.draft:
            nn.init.zeros_(self.unet.conv_out.weight)
            nn.init.zeros_(self.unet.conv_out.bias)

    def forward(
        self,
        noisy: Float[Tensor, "batch channel row column"],
        timesteps: Tensor,
        tokens: Float[Tensor, "batch token dim"],
        extra: Float[Tensor, "batch context cross"] | None = None,
    ) -> Float[Tensor, "batch channel row column"]:
        """Predict the noise or the velocity.

        Args:
            noisy: Noisy latents.
            timesteps: Integer timestep of each.
            tokens: Compressed tokens of the picture.
            extra: Further entries of the cross-attention context, after the tokens.
        """
        context = self.project_tokens(tokens)
        context = context if extra is None else torch.cat([context, extra], dim=1)
        if self.draft is None:
            return self._denoise(noisy, timesteps, context, tokens)
        draft = self.draft(tokens)
        if draft.shape[2:] != noisy.shape[2:]:
            draft = functional.interpolate(draft, noisy.shape[2:], mode="bilinear")
        rest = self._denoise(torch.cat([noisy, draft], dim=1), timesteps, context, tokens)
        signal = self.signal[timesteps].view(-1, 1, 1, 1)
        velocity = self.draft.predict_velocity(noisy, draft, signal)
        if self.prediction == "v_prediction":
            return rest + velocity
        return rest + (1 - signal).sqrt() * noisy + signal.sqrt() * velocity

    def _denoise(self, given: Tensor, timesteps: Tensor, context: Tensor, tokens: Tensor) -> Tensor:
        given = given.contiguous(memory_format=torch.channels_last)
        return self.unet(given, timesteps, context, class_labels=tokens.flatten(1)).sample


class Autoencoder(nn.Module):
    """Picture to tokens and back.

    Args:
        architecture: Sizes.
        weights_dir: Folder of pulled weights; None for the default one.
    """

    def __init__(self, architecture: Architecture, weights_dir: Path | None = None):
        super().__init__()
        a = self.architecture = architecture
        self.encoder = DinoV2(weights_dir)
        patches = (a.encoder_height_px // self.encoder.patch_px) * (a.encoder_width_px // self.encoder.patch_px)
        self.latents = BlockCosineTransform(a.block_px, a.luma, a.chroma, a.flattening)
        self.compressor = Compressor(a, self.encoder.dim, patches)
        self.schedule = NoiseSchedule(a.timesteps, a.prediction)
        self.decoder = Decoder(a, self.latents.channels, self.schedule)

    @torch.no_grad()
    def extract_features(
        self, images: Float[Tensor, "batch 3 height width"], batch: int = 16
    ) -> Float[Tensor, "batch patch feature"]:
        """The frozen encoder's features of RGB pictures in 0..1, all of them scaled to the encoder's size."""
        size = (self.architecture.encoder_height_px, self.architecture.encoder_width_px)
        return torch.cat([self.encoder.encode(scale_pictures(part, *size)) for part in images.split(batch)])

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch token dim"]:
        """Tokens of RGB pictures in 0..1 of any size; each token has zero mean and unit variance over its dim numbers.

        What lies outside the decoder's shape, around the middle, is not seen: see `models.latents.cover`.
        """
        covered = cover(images, self.architecture.height_px, self.architecture.width_px)
        return self.compressor(self.extract_features(covered))

    @torch.no_grad()
    def decode(
        self, tokens: Float[Tensor, "batch token dim"], steps: int, seed: int, batch: int = 16
    ) -> Float[Tensor, "batch 3 height width"]:
        """RGB pictures in 0..1 of tokens, by `steps` DDIM steps; the same seed gives the same pictures."""
        return sample_pictures(self, self.decoder, (tokens,), steps, seed, batch)


def sample_pictures(
    model: Autoencoder,
    denoiser: Callable[..., Tensor],
    conditions: Sequence[Tensor],
    steps: int,
    seed: int,
    batch: int,
    report: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "batch 3 height width"]:
    """RGB pictures in 0..1 by DDIM.

    Args:
        model: Gives the schedule and the latents.
        denoiser: Called as `denoiser(noisy, timesteps, *conditions)`.
        conditions: Tensors with one entry a picture.
        steps: DDIM steps.
        seed: Of the starting noise.
        batch: Pictures at once.
        report: Called with the count of finished pictures after each batch.
    """
    noise = draw_noise(model, len(conditions[0]), seed).to(conditions[0])
    pictures: list[Tensor] = []
    for start, *parts in zip(noise.split(batch), *(c.split(batch) for c in conditions), strict=True):
        latents = model.schedule.sample(lambda z, t, parts=parts: denoiser(z, t, *parts), start, steps)
        pictures.append(model.latents.decode(latents))
        report(sum(map(len, pictures)))
    return torch.cat(pictures)


def draw_noise(model: Autoencoder, count: int, seed: int) -> Float[Tensor, "batch channel row column"]:
    """The starting noise of `count` pictures: the noise of each depends on the seed and its place only."""
    a = model.architecture
    shape = (count, model.latents.channels, a.height_px // a.block_px, a.width_px // a.block_px)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save_autoencoder(model: Autoencoder, folder: Path) -> None:
    """Write `model.safetensors` (without the frozen encoder) and `config.json`."""
    state = {n: t.contiguous() for n, t in model.state_dict().items() if not n.startswith("encoder.")}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(model.architecture), indent=2) + "\n")


def load_autoencoder(paths: Sequence[Path], weights_dir: Path | None = None) -> Autoencoder:
    """Read an autoencoder from the files of its artifact, in any order.

    Raises:
        ValueError: One of the two files is not among them.
    """
    by_name = {path.name: path for path in paths}
    for name in ("config.json", "model.safetensors"):
        if name not in by_name:
            raise ValueError(f"autoencoder has no {name} among {sorted(by_name)}: train it again")
    settings = json.loads(by_name["config.json"].read_text())
    model = Autoencoder(Architecture(**{**settings, "channels": tuple(settings["channels"])}), weights_dir)
    missing, unexpected = model.load_state_dict(load_file(by_name["model.safetensors"]), strict=False)
    wrong = [name for name in missing if not name.startswith("encoder.")] + unexpected
    if wrong:
        raise ValueError(f"autoencoder weights do not fit its config.json: {wrong[:5]}; train it again")
    return model.eval()


def _blocks(width: int, heads: int) -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, num_layers=3, enable_nested_tensor=False)
