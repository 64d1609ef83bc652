"""The ID-preserving decoder: the trained decoder with sentences and faces beside the tokens in its cross-attention.

Dimensions: batch; token, dim = compressed tokens and their width; sentence, text = sentence embeddings, zero-padded,
and their width; face, feature = face embeddings, zero-padded, and their width; channel, row, column of a latent;
context = token + sentence + face.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.autoencoder import Autoencoder, sample_pictures
from models.diffusion import add_token_noise

SAVED = ("autoencoder.decoder.", "align_text.", "align_faces.")


class Renderer(nn.Module):
    """Tokens, sentences and faces to pictures.

    Source: section 3.4 and the last paragraph of appendix A.

    Args:
        autoencoder: Its decoder is where training starts from, and is changed by it.
        text_dim: Width of a sentence embedding.
        face_dim: Width of a face embedding.
        max_sentences: Sentences a picture takes.
        max_faces: Faces a picture takes; 0 where there was no face to learn from.
    """

    def __init__(self, autoencoder: Autoencoder, text_dim: int, face_dim: int, max_sentences: int, max_faces: int):
        super().__init__()
        self.autoencoder = autoencoder
        self.sizes = {
            "text_dim": text_dim,
            "face_dim": face_dim,
            "max_sentences": max_sentences,
            "max_faces": max_faces,
        }
        cross_dim = autoencoder.decoder.cross_dim
        self.align_text = _mlp(text_dim, cross_dim)
        self.align_faces = _mlp(face_dim, cross_dim)

    def forward(
        self,
        noisy: Float[Tensor, "batch channel row column"],
        timesteps: Tensor,
        tokens: Float[Tensor, "batch token dim"],
        sentences: Float[Tensor, "batch sentence text"],
        faces: Float[Tensor, "batch face feature"],
        keep: Bool[Tensor, "batch context"] | None = None,
    ) -> Float[Tensor, "batch channel row column"]:
        """Predict the noise or the velocity; `keep` says which entries of the context are not masked.

        A masked entry is zero, and so is the padding. A masked token is zero in the time embedding too, else its
        mask would hide nothing.
        """
        aligned_text = self.align_text(sentences) * (sentences != 0).any(dim=-1, keepdim=True)
        aligned_faces = self.align_faces(faces) * (faces != 0).any(dim=-1, keepdim=True)
        extra = torch.cat([aligned_text, aligned_faces], dim=1)
        if keep is not None:
            count = tokens.shape[1]
            tokens, extra = tokens * keep[:, :count, None], extra * keep[:, count:, None]
        return self.autoencoder.decoder(noisy, timesteps, tokens, extra)

    def loss(
        self,
        latents: Float[Tensor, "batch channel row column"],
        tokens: Float[Tensor, "batch token dim"],
        sentences: Float[Tensor, "batch sentence text"],
        faces: Float[Tensor, "batch face feature"],
        mask_probability: float,
        noise_offset: float,
        token_noise: float,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Equation 1 of pictures, each entry of the context masked by chance.

        Args:
            latents: Before normalisation.
            tokens, sentences, faces: The context, padded.
            mask_probability: Of each entry.
            noise_offset: See `NoiseSchedule.loss`.
            token_noise: Largest standard deviation of noise on the tokens.
            generator: Of all that is random.
        """
        tokens = add_token_noise(tokens, token_noise, generator)
        entries = tokens.shape[1] + sentences.shape[1] + faces.shape[1]
        keep = (torch.rand((len(latents), entries), generator=generator) >= mask_probability).to(latents.device)
        return self.autoencoder.schedule.loss(
            lambda noisy, steps: self(noisy, steps, tokens, sentences, faces, keep),
            self.autoencoder.latents.normalize(latents),
            noise_offset,
            generator,
        )

    def decode(
        self,
        tokens: Float[Tensor, "batch token dim"],
        sentences: Float[Tensor, "batch sentence text"],
        faces: Float[Tensor, "batch face feature"],
        steps: int,
        seed: int,
        batch: int = 16,
        **sampling: Any,
    ) -> Iterator[tuple[range, Float[Tensor, "batch 3 height width"]]]:
        """RGB pictures in 0..1 a batch at a time; the same seed gives the same ones. See `sample_pictures`."""
        conditions = (tokens, sentences, faces)
        return sample_pictures(self.autoencoder, self, conditions, steps, seed, batch, **sampling)

    def pad_sentences(self, rows: Sequence[Float[np.ndarray, "_ text"]]) -> Float[Tensor, "batch sentence text"]:
        """The first sentences of each picture, zero-padded to the number that the model takes."""
        return pad(rows, self.sizes["max_sentences"], self.sizes["text_dim"])

    def pad_faces(self, rows: Sequence[Float[np.ndarray, "_ feature"]]) -> Float[Tensor, "batch face feature"]:
        """The first faces of each picture, zero-padded to the number that the model takes."""
        return pad(rows, self.sizes["max_faces"], self.sizes["face_dim"])


def save_renderer(model: Renderer, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write `model.safetensors` (what the autoencoder does not already hold) and `config.json`.

    Args:
        model: Its sizes are kept.
        folder: Where the files go.
        state: Its state dict, where it lies in several processes; None takes the model's own.
    """
    state = model.state_dict() if state is None else state
    kept = {name: tensor.cpu().contiguous() for name, tensor in state.items() if name.startswith(SAVED)}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.sizes, indent=2) + "\n")


def load_renderer(paths: Sequence[Path], autoencoder: Autoencoder) -> Renderer:
    """Read a renderer from the files of its artifact; `autoencoder` is the one that it was trained from.

    Raises:
        ValueError: A file is missing, or the weights do not fit the autoencoder.
    """
    by_name = {path.name: path for path in paths}
    for name in ("config.json", "model.safetensors"):
        if name not in by_name:
            raise ValueError(f"renderer has no {name} among {sorted(by_name)}: train it again")
    model = Renderer(autoencoder, **json.loads(by_name["config.json"].read_text()))
    state = load_file(by_name["model.safetensors"], autoencoder.device)
    expected = {name: t.shape for name, t in model.state_dict().items() if name.startswith(SAVED)}
    wrong = [
        name for name in expected.keys() | state.keys() if name not in state or expected.get(name) != state[name].shape
    ]
    if wrong:
        raise ValueError(f"renderer does not fit its autoencoder at {sorted(wrong)[:3]}: train the renderer again")
    model.load_state_dict(state, strict=False)
    return model.eval().to(autoencoder.device)


def pad(rows: Sequence[np.ndarray], count: int, width: int) -> Tensor:
    """The first `count` rows of each array [row, width], with zeros where there are fewer."""
    padded = torch.zeros(len(rows), count, width)
    for place, row in enumerate(rows):
        padded[place, : min(count, len(row))] = torch.from_numpy(np.array(row[:count], np.float32))
    return padded


def _mlp(width: int, cross_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, cross_dim), nn.GELU(), nn.Linear(cross_dim, cross_dim))
