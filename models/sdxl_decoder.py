"""The paper's decoder: the UNet of pretrained SDXL, conditioned on compressed tokens in the place of a text.

Dimensions: batch; token, dim = compressed tokens and their width; channel, row, column of a latent; context =
cross-attention entries; cross = their width (2048).
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from models.autoencoder_sizes import Architecture
from models.pretrained import load_diffusers, read_diffusers_config

TIME_IDS = 6
"""Numbers that tell SDXL a picture's size: of the original, of the crop's corner, of the target."""


class SdxlDecoder(nn.Module):
    """SDXL's UNet. The tokens are its cross-attention context; its pooled text is one linear map of all of them.

    Source: appendix A ("we concatenate and project the compressed token into the desired input space of SDXL simply
    using a linear layer").

    Args:
        architecture: Sizes of the tokens.
        unet: SDXL's.

    Raises:
        ValueError: The UNet takes no pooled text, so it is not SDXL's.
    """

    def __init__(self, architecture: Architecture, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        found = unet.config
        if found.addition_embed_type != "text_time":
            raise ValueError(
                f"the UNet has addition_embed_type {found.addition_embed_type!r}: expected SDXL's text_time"
            )
        self.cross_dim = int(found.cross_attention_dim)
        pooled = int(found.projection_class_embeddings_input_dim) - TIME_IDS * int(found.addition_time_embed_dim)
        self.pixels = architecture.space.block_px
        self.project_tokens = nn.Linear(architecture.token_dim, self.cross_dim)
        self.project_pooled = nn.Linear(architecture.tokens * architecture.token_dim, pooled)

    def forward(
        self,
        noisy: Float[Tensor, "batch channel row column"],
        timesteps: Tensor,
        tokens: Float[Tensor, "batch token dim"],
        extra: Float[Tensor, "batch context cross"] | None = None,
    ) -> Float[Tensor, "batch channel row column"]:
        """Predict the noise or the velocity; as `models.small_decoder.SmallDecoder.forward`."""
        context = self.project_tokens(tokens)
        context = context if extra is None else torch.cat([context, extra.to(context)], dim=1)
        height, width = (side * self.pixels for side in noisy.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=context.dtype, device=context.device)
        added = {"text_embeds": self.project_pooled(tokens.flatten(1)), "time_ids": sizes.expand(len(noisy), TIME_IDS)}
        return self.unet(noisy, timesteps, context, added_cond_kwargs=added).sample


def load_unet(folder: Path) -> UNet2DConditionModel:
    """SDXL's UNet with its weights, in float32.

    Args:
        folder: SDXL in the layout of its makers, with `unet/`.

    Raises:
        WeightsError: The folder holds no such UNet.
    """
    return load_diffusers("SDXL's UNet", folder / "unet", UNet2DConditionModel)


def describe_unet(folder: Path) -> UNet2DConditionModel:
    """SDXL's UNet without memory for its weights: to be filled by `load_state_dict(..., assign=True)`.

    Raises:
        WeightsError: The folder holds no such UNet.
    """
    config = read_diffusers_config("SDXL's UNet", folder / "unet", UNet2DConditionModel)
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)
