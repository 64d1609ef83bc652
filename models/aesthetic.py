"""The aesthetic predictor: how much people like a picture, about 1 to 10, from its CLIP ViT-L/14 embedding.

Dimensions: picture; dim = width of the embedding (768 for ViT-L/14).

Source: LAION's improved aesthetic predictor, `sac+logos+ava1-l14-linearMSE.pth`: five linear layers without anything
between them but dropout, so that the rating is one linear function of the embedding of length 1.
"""

from pathlib import Path

import torch
from jaxtyping import Float32
from numpy import ndarray
from torch import nn

from models.tensor_files import load_strictly, read_tensors
from models.weights import WeightsError

WHAT = "an aesthetic predictor (sac+logos+ava1-l14-linearMSE)"
WIDTHS = (1024, 128, 64, 16, 1)
DROPOUTS = (0.2, 0.2, 0.1)
"""After the first three layers; they act in training only, and give the layers their numbers in the file."""


class AestheticHead(nn.Module):
    """The layers, numbered as upstream's file numbers them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, outward in enumerate(WIDTHS):
            layers.append(nn.Linear(width, outward))
            layers += [nn.Dropout(DROPOUTS[index])] if index < len(DROPOUTS) else []
            width = outward
        self.layers = nn.Sequential(*layers)


class Aesthetic:
    """Ratings of pictures by their CLIP embeddings.

    Args:
        place: The upstream file, what `weights pull` made of it, or the folder of either.

    Attributes:
        width: Numbers in an embedding.

    Raises:
        WeightsError: The file is no such predictor.
    """

    def __init__(self, place: Path) -> None:
        state = read_tensors(WHAT, place)
        first = state.get("layers.0.weight")
        if first is None or first.dim() != 2:
            raise WeightsError(f"{place} is not {WHAT}: it holds no layers.0.weight")
        self.width = int(first.shape[1])
        self._head = load_strictly(WHAT, place, AestheticHead(self.width), state)

    @torch.inference_mode()
    def __call__(self, embeddings: Float32[ndarray, "picture dim"]) -> Float32[ndarray, " picture"]:
        """Rate pictures by embeddings of length 1.

        Raises:
            WeightsError: The embeddings are not those of the CLIP that the predictor was trained on.
        """
        if embeddings.shape[1] != self.width:
            raise WeightsError(
                f"the aesthetic predictor takes CLIP embeddings of {self.width} numbers, and CLIP gives "
                f"{embeddings.shape[1]}: set evaluate.clip to the CLIP that it was trained on, clip_vit_l14"
            )
        return self._head.layers(torch.from_numpy(embeddings)).squeeze(1).numpy()
