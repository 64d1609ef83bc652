"""What the ID-preserving decoder is trained on: latents of keyframes with their tokens, sentences and faces.

Dimensions: token, dim = compressed tokens and their width; sentence, text = sentence embeddings, zero-padded, and their
width; face, feature = face embeddings, zero-padded, and their width; channel, row, column of a latent.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.feature_table import VIEWS, FeatureTable
from models.renderer import pad
from models.token_table import TokenTable


class RendererDataError(ValueError):
    """Tokens and features do not belong together; the message says where."""


class RendererViews(Dataset):
    """Keyframes and their mirror images: row `index // 2` of the table of tokens, mirrored where the index is odd.

    Args:
        tokens: Folder of the table of tokens.
        features: Folders of features.
        max_sentences: Sentences a picture takes.
        max_faces: Faces a picture takes.

    Attributes:
        tokens: The table.
        sizes: What `Renderer` needs; `max_faces` is 0 where there is no face to learn from.

    Raises:
        RendererDataError: A keyframe with tokens has no features, or none is for training.
    """

    def __init__(self, tokens: Path, features: Sequence[Path], max_sentences: int, max_faces: int) -> None:
        self._path = tokens
        self.tokens = table = TokenTable(tokens)
        self._features = FeatureTable(features, "keyframes")
        places = {(film, frame): row for row, (film, frame, _) in enumerate(self._features.read_keys())}
        keys = [table.key(row) for row in range(len(table))]
        if missing := [key for key in keys if key not in places]:
            film, frame = missing[0]
            raise RendererDataError(
                f"{len(missing)} keyframes have tokens and no features, first frame {frame} of {film}: "
                "run the features stage on these shards again"
            )
        if not table.split_rows("train"):
            raise RendererDataError(f"{tokens} holds {len(table)} keyframes, none for training: ingest films first")
        self._places = [places[key] for key in keys]
        has_faces = any(self._faces(row) for row in range(len(table)))
        self.sizes = {
            "text_dim": table.widths["text_width"],
            "face_dim": table.widths["face_width"],
            "max_sentences": max_sentences,
            "max_faces": max_faces if has_faces else 0,
        }

    def __len__(self) -> int:
        return VIEWS * len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents before normalisation, tokens, padded sentences and padded faces, float32."""
        row, mirrored = divmod(index, VIEWS)
        sizes = self.sizes
        (latents,) = self._features.latents([VIEWS * self._places[row] + mirrored])
        tokens = torch.from_numpy(np.array(self.tokens.tokens(row, bool(mirrored)), np.float32))
        (sentences,) = pad([self.tokens.sentences(row, bool(mirrored))], sizes["max_sentences"], sizes["text_dim"])
        own = np.array(self._faces(row), np.float32).reshape(-1, sizes["face_dim"])
        (faces,) = pad([own], sizes["max_faces"], sizes["face_dim"])
        return latents, tokens, sentences, faces

    def training_views(self) -> list[int]:
        """Indices of the training split, pictures before mirror images."""
        return [VIEWS * row + view for view in range(VIEWS) for row in self.tokens.split_rows("train")]

    def _faces(self, row: int) -> list[np.ndarray]:
        """The keyframe's own face of each of its characters that has one, in the script's order."""
        table = self.tokens
        characters = [character.character_index for character in table.script(row).characters]
        places = [table.own_face(row, character) for character in characters if character is not None]
        return [table.face(row, place) for place in places if place is not None]
