"""Turns every keyframe into what the story model reads: compressed tokens, sentence embeddings, face embeddings.

Tokens and sentences come twice, for the keyframe and for its mirror image, because training flips windows at random.

Source: the paper, section 3.2 (tokens) and section 3.3 (one embedding a description; flips).
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from models import weights
from models.script import FrameScript
from stages.errors import MissingInputError
from stages.spec import Inputs, Progress, StageConfig, StageSpec, neutral


class TokenizeConfig(StageConfig):
    """Settings of the tokenize stage."""

    text_encoder: str = Field(
        "minilm_l6", description="encoder of description sentences: name of `weights list` or local folder"
    )
    batch_pictures: int = neutral(16, "keyframes encoded at once", ge=1)

    def weights(self) -> tuple[str, ...]:
        """The text encoder, and the image encoder in front of the compressor."""
        return (self.text_encoder, "dinov2_small")

    def recipe(self) -> dict[str, Any]:
        """Weights enter by what they hold, not by where they lie."""
        return weights.without_places(super().recipe(), "text_encoder")


SPEC = StageSpec(
    name="tokenize",
    version=1,
    implementation="stages.tokenize:Tokenize",
    inputs=("shards", "autoencoder"),
    output="tokens",
    scope="set",
    cpus=2,
    gpus=1,
    description="Tokens, sentence and face embeddings of every keyframe and its mirror image",
)


class Tokenize:
    """Writes `tokens.parquet`; see `models.token_table` for its columns."""

    def __init__(self, config: TokenizeConfig, weights_dir: Path | None = None) -> None:
        import torch

        from models.text_encoder import open_sentence_encoder

        self._config, self._weights_dir = config, weights_dir
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._text_encoder = open_sentence_encoder(weights.locate(config.text_encoder, weights_dir), self._device)

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Tokenize all keyframes of the shards.

        Returns:
            `keyframes`, `films` and `sentences` (different ones), counted.

        Raises:
            MissingInputError: The shards hold no keyframe.
        """
        from models.autoencoder import load_autoencoder
        from models.token_table import write_token_table

        autoencoder = load_autoencoder(inputs["autoencoder"], self._weights_dir).to(self._device)
        shards = [path for path in inputs["shards"] if path.suffix == ".tar"]
        rows: list[dict[str, Any]] = []
        for index, shard in enumerate(shards):
            for samples in self._batches(shard):
                tokens = self._encode_pictures(autoencoder, samples)
                rows += [_row(sample, *pair) for sample, pair in zip(samples, tokens, strict=True)]
                progress(index, len(shards), f"{len(rows)} keyframes")
        if not rows:
            raise MissingInputError(f"{len(shards)} shards hold no keyframe: ingest a film first")
        progress(len(shards), len(shards), "sentences")
        sentences = self._add_sentences(rows)
        write_token_table(rows, out / "tokens.parquet", self._widths(autoencoder, rows))
        return {"keyframes": len(rows), "films": len({row["film_id"] for row in rows}), "sentences": sentences}

    def _batches(self, shard: Path) -> Iterator[list[dict[str, Any]]]:
        """Samples with their picture decoded (uint8 [height, width, 3]), in batches of one picture size."""
        from models.samples import read_samples

        decoded = (sample | {"picture": _decode(sample)} for sample in read_samples([shard]))
        for _, same_size in groupby(decoded, key=lambda sample: sample["picture"].shape):
            batch: list[dict[str, Any]] = []
            for sample in same_size:
                batch.append(sample)
                if len(batch) == self._config.batch_pictures:
                    yield batch
                    batch = []
            if batch:
                yield batch

    def _encode_pictures(self, autoencoder: Any, samples: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens of each picture and of its mirror image."""
        import torch

        pictures = torch.from_numpy(np.stack([sample["picture"] for sample in samples]))
        pictures = pictures.to(self._device).permute(0, 3, 1, 2).float() / 255
        plain, mirrored = (autoencoder.encode(p).cpu().numpy() for p in (pictures, pictures.flip(-1)))
        return list(zip(plain, mirrored, strict=True))

    def _add_sentences(self, rows: list[dict[str, Any]]) -> int:
        """Embed the sentences of all rows, each different one once; returns how many there are."""
        scripts = {
            (index, name): FrameScript.model_validate_json(row[name]).sentences()
            for index, row in enumerate(rows)
            for name in ("script", "mirrored_script")
        }
        different = sorted({sentence for sentences in scripts.values() for sentence in sentences})
        embeddings = dict(zip(different, self._text_encoder.encode(different), strict=True))
        for (index, name), sentences in scripts.items():
            column = name.replace("script", "sentence_embeddings")
            rows[index][column] = np.asarray([embeddings[s] for s in sentences], np.float32)
        return len(different)

    def _widths(self, autoencoder: Any, rows: list[dict[str, Any]]) -> dict[str, int]:
        return {
            "tokens_per_frame": autoencoder.architecture.tokens,
            "token_dim": autoencoder.architecture.token_dim,
            "text_width": self._text_encoder.width,
            "face_width": max((row["face_embeddings"].shape[-1] for row in rows if row["face_character"]), default=1),
        }


def _decode(sample: dict[str, Any]) -> np.ndarray:
    """RGB uint8 [height, width, 3]."""
    import cv2

    picture = cv2.imdecode(np.frombuffer(sample["jpg"], np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise ValueError(f"keyframe {sample['__key__']} of the shards cannot be decoded: make the shards again")
    return picture


def _row(sample: dict[str, Any], tokens: np.ndarray, mirrored_tokens: np.ndarray) -> dict[str, Any]:
    facts = sample["json"]
    script = FrameScript.model_validate(facts["script"])
    characters = [face["character_index"] for face in facts["faces"]]
    return {name: facts[name] for name in ("film_id", "frame_index", "time_s", "shot_index", "split")} | {
        "tokens": tokens,
        "mirrored_tokens": mirrored_tokens,
        "script": script.model_dump_json(),
        "mirrored_script": script.mirrored().model_dump_json(),
        "face_character": [-1 if character is None else character for character in characters],
        "face_embeddings": sample["faces.npy"].astype(np.float32),
    }
