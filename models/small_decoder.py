"""The small decoder of the embedded profile: a UNet trained from nothing, which completes a first guess.

Dimensions: batch; token, dim = compressed tokens and their width; channel, row, column of a latent; context =
cross-attention entries; cross = their width.
"""

import math

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from models.autoencoder_sizes import Architecture
from models.diffusion import NoiseSchedule

SPREAD_START = -0.25  # a variance of exp(-1): drafts are poor at first


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


class SmallDecoder(nn.Module):
    """The denoiser: a UNet with cross-attention to the context and a projection of the tokens in its time embedding.

    Source: section 3.2 and appendix A, at a size that a CPU trains. Attention only at the lowest resolution.
    """

    def __init__(self, architecture: Architecture, schedule: NoiseSchedule):
        super().__init__()
        a = architecture
        self.cross_dim, latent_channels = a.cross_dim, a.space.latent_channels
        self.project_tokens = nn.Linear(a.token_dim, a.cross_dim, bias=False)
        self.draft = None
        if a.draft_components:
            self.draft = Draft(a, a.space.latent_shape(a.space.height_px, a.space.width_px))
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
