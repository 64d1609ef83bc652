"""Turns every keyframe into what the story model reads: compressed tokens, sentence embeddings, face embeddings.

Tokens and sentences come twice, for the keyframe and for its mirror image, because training flips windows at random.

Source: the paper, section 3.2 (tokens) and section 3.3 (one embedding a description; flips).
"""

import itertools
from collections import Counter
from collections.abc import Iterator
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
        """The text encoder."""
        return (self.text_encoder,)

    def recipe(self) -> dict[str, Any]:
        """Weights enter by what they hold, not by where they lie."""
        return weights.without_places(super().recipe(), "text_encoder")


SPEC = StageSpec(
    name="tokenize",
    version=3,
    implementation="stages.tokenize:Tokenize",
    inputs=("shards", "features", "autoencoder"),
    output="tokens",
    scope="set",
    cpus=2,
    gpus=1,
    description="Tokens, sentence and face embeddings of every keyframe and its mirror image",
)


class Tokenize:
    """Writes a table of tokens, shard by shard; see `models.token_table`."""

    def __init__(self, config: TokenizeConfig, weights_dir: Path | None = None) -> None:
        import torch

        from models.text_encoder import open_sentence_encoder

        self._config, self._weights_dir = config, weights_dir
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._text_encoder = open_sentence_encoder(weights.locate(config.text_encoder, weights_dir), self._device)

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Tokenize all keyframes of the shards.

        Returns:
            `keyframes`, `films` and `sentences` (different ones of a shard), counted.

        Raises:
            MissingInputError: The shards hold no keyframe, or one that has no features.
        """
        from models.autoencoder import load_autoencoder
        from models.feature_table import FeatureTable, feature_folders
        from models.token_table import write_token_table

        autoencoder = load_autoencoder(inputs["autoencoder"], self._weights_dir, self._device)
        table = FeatureTable(feature_folders(inputs["features"]), "keyframes")
        places = {(film, frame): row for row, (film, frame, _) in enumerate(table.read_keys())}
        widths = {
            "tokens_per_frame": autoencoder.architecture.tokens,
            "token_dim": autoencoder.architecture.token_dim,
            "text_width": self._text_encoder.width,
        }
        counts, films = Counter({"keyframes": 0, "sentences": 0}), set()
        same = table.space.sees_as(autoencoder.architecture.space)

        def tokenize_shards() -> Iterator[list[dict[str, Any]]]:
            for shard in inputs["shards"]:
                rows: list[dict[str, Any]] = []
                for batch in self._batches(shard):
                    features = _read_features(table, places, batch) if same else _compute_features(autoencoder, batch)
                    tokens = self._compress(autoencoder, features)
                    rows += [_row(sample, *views) for sample, views in zip(batch, tokens, strict=True)]
                    done = counts["keyframes"] + len(rows)
                    progress(done, len(places), f"{done} keyframes")
                counts["keyframes"] += len(rows)
                counts["sentences"] += self._add_sentences(rows)
                films.update(row["film_id"] for row in rows)
                yield rows

        write_token_table(tokenize_shards(), out, widths)
        if not counts["keyframes"]:
            raise MissingInputError("the shards hold no keyframe: ingest a film first")
        return dict(counts) | {"films": len(films)}

    def _batches(self, shard: Path) -> Iterator[list[dict[str, Any]]]:
        from models.samples import read_samples

        samples = read_samples([shard])
        while batch := list(itertools.islice(samples, self._config.batch_pictures)):
            yield batch

    def _compress(self, autoencoder: Any, features: Any) -> np.ndarray:
        """Tokens of keyframes and of their mirror images, float32 [keyframe, view, token, dim]."""
        import torch

        with torch.no_grad():
            tokens = autoencoder.compressor(features.to(self._device))
        return tokens.unflatten(0, (-1, 2)).cpu().numpy()

    def _add_sentences(self, rows: list[dict[str, Any]]) -> int:
        """Embed the sentences of rows, each different one once; returns how many there are."""
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


def _read_features(table: Any, places: dict[tuple[str, int], int], samples: list[dict[str, Any]]) -> Any:
    """Features of keyframes, each followed by its mirror image's."""
    from models.feature_table import VIEWS

    rows = []
    for sample in samples:
        key = (sample["json"]["film_id"], sample["json"]["frame_index"])
        if key not in places:
            raise MissingInputError(f"keyframe {sample['__key__']} has no features: run the features stage again")
        rows.append(places[key])
    return table.features(VIEWS * row + view for row in rows for view in range(VIEWS))


def _compute_features(autoencoder: Any, samples: list[dict[str, Any]]) -> Any:
    """The same for an autoencoder with other frozen models than today's settings name: an older model."""
    import torch

    from models.latents import read_keyframes

    size = autoencoder.architecture
    pictures = read_keyframes((sample["jpg"] for sample in samples), size.height_px, size.width_px)
    return autoencoder.extract_features(torch.stack([pictures, pictures.flip(3)], dim=1).flatten(0, 1))


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
