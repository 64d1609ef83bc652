"""Measures what a run generated and learned, each number beside its definition.

The numbers of the paper's tables 1 and 2 for the generated pictures, or for another system's pictures of the same
story; DINOv2's beside them; and what training measured (reconstruction retrieval, held-out likelihood). A number whose
inputs or weights are not there is null, and its `computed_with` says why.

Source: section 4.2 of the paper, tables 1 and 2.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from models import weights
from models.measures import LIKELIHOODS, LONG_TERM, RETRIEVAL, Number
from stages.errors import ComputationError
from stages.face_choice import FaceChoice
from stages.spec import Inputs, Progress, Row, StageConfig, StageSpec, neutral

if TYPE_CHECKING:
    from models.face_models import FaceModels
    from models.image_encoder import ImageEncoder
    from models.picture_scores import Extractors

FEATURES = "DINOv2-S (hidden states after layer 8, mean over patches)"
SAME_FACE_COSINE = 0.9  # between conditioning embeddings: the story's face is then one of the films' faces


class EvaluateConfig(StageConfig):
    """Settings of the measures."""

    height_px: int = Field(252, ge=14, multiple_of=14, description="Height at which pictures enter the encoder.")
    width_px: int = Field(448, ge=14, multiple_of=14, description="Width at which pictures enter the encoder.")
    real_keyframes: int = Field(50_000, ge=2, description="At most this many keyframes of the films, evenly spaced.")
    face_score: float = Field(0.5, ge=0, le=1, description="Score from which a detected face counts in LT.")
    identity_distance: float = Field(
        0.5, gt=0, description="Distance to the mean identity embedding up to which a face is the character's."
    )
    face_models: FaceChoice = Field(FaceChoice(), description="As `models` of the faces stage; LT asks them.")
    clip: str | None = Field(
        None, description="CLIP: name of `weights list` or local folder; none leaves out its numbers."
    )
    inception: str | None = Field(
        None, description="Inception-v3 of FID: name, local file or folder; none leaves out FID and IS."
    )
    aesthetic: str | None = Field(
        None, description="Aesthetic predictor on CLIP: name, local file or folder; none leaves out its score."
    )
    batch: int = neutral(8, "Pictures encoded at once.", ge=1)

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if self.aesthetic is not None and self.clip is None:
            raise ValueError(f"aesthetic={self.aesthetic} rates CLIP embeddings: set clip too, to clip_vit_l14")
        return self

    def is_heavy(self) -> bool:
        """CLIP and Inception are, and so are the large face models."""
        return bool(self.clip or self.inception) or self.face_models.is_heavy()

    def weights(self) -> tuple[str, ...]:
        """The feature spaces, and the face models of LT."""
        chosen = filter(None, (self.clip, self.inception, self.aesthetic))
        return tuple(dict.fromkeys(("dinov2_small", *chosen, *self.face_models.weights())))

    def recipe(self) -> dict[str, Any]:
        """Weights enter by what they hold, not by where they lie."""
        values = weights.without_places(super().recipe(), "clip", "inception", "aesthetic")
        return values | {"face_models": self.face_models.recipe()}


SPEC = StageSpec(
    name="evaluate",
    version=3,
    implementation="stages.evaluate:Evaluate",
    inputs=("pictures", "dream", "shards", "autoencoder", "autoregressive"),
    output="evaluation",
    scope="set",
    cpus=2.0,
    description="the paper's scores, likeness to the films, and what training measured",
)


@dataclass(frozen=True)
class FilmFaces:
    """The films' faces that belong to a character, row by row.

    Attributes:
        characters: Film and character of each face.
        conditioning: Conditioning embeddings, float32 [face, width].
        identities: Identity embeddings, float32 [face, width].
    """

    characters: list[tuple[str, int]]
    conditioning: np.ndarray
    identities: np.ndarray

    def center(self, character: tuple[str, int]) -> np.ndarray:
        """Mean identity embedding of a character."""
        return self.identities[[name == character for name in self.characters]].mean(axis=0)


class Evaluate:
    """Writes `evaluation.json`, a list of `Number`s; any input may be absent."""

    def __init__(self, config: EvaluateConfig, weights_dir: Path | None = None):
        self.config = config
        self.weights_dir = weights_dir

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Measure what is there.

        Returns:
            Name to value.

        Raises:
            ComputationError: A picture cannot be decoded, or its features are not finite.
        """
        from models.metrics import NotFiniteError
        from models.picture_scores import score_pictures

        pictures = _read_rows(inputs, "pictures", ["frame_index", "script", "jpeg"])
        dream = _read_rows(inputs, "dream", ["frame_index", "face_embeddings"])
        shards = [path for path in inputs.get("shards", ()) if path.suffix == ".tar"]
        faces, keyframe_count = read_film_faces(shards)
        stride = -(-keyframe_count // self.config.real_keyframes) or 1
        steps = _Steps(progress, 2 * len(pictures or ()) + len(range(0, keyframe_count, stride)))

        batch, keyframes = (
            self.config.batch,
            (_decode(j, "keyframe of a film") for j in _read_keyframes(shards, stride)),
        )
        real = self._extractors.look(keyframes, batch, steps.of("encode keyframes of the films"), with_clip=False)
        try:
            numbers = score_pictures(
                (_decode(row["jpeg"], "generated picture") for row in pictures or ()),
                None if pictures is None else [row["script"] for row in pictures],
                self._extractors,
                real,
                batch,
                steps.of("encode generated pictures"),
            )
        except NotFiniteError as error:
            raise ComputationError(str(error)) from error
        numbers.append(self._measure_long_term(pictures, dream, faces, steps.of("look for the characters")))
        numbers += [read_retrieval(_read_metrics(inputs, "autoencoder"))]
        numbers += read_likelihoods(_read_metrics(inputs, "autoregressive"))
        text = json.dumps([asdict(number) for number in numbers], indent=1, allow_nan=False)
        (out / "evaluation.json").write_text(text + "\n")
        return {number.name: number.value for number in numbers}

    @cached_property
    def _extractors(self) -> "Extractors":
        """What looks at pictures, under these settings."""
        from models.picture_scores import Extractors

        clip, inception, aesthetic = None, None, None
        if self.config.clip is not None:
            from models.clip import Clip

            clip = Clip(weights.locate(self.config.clip, self.weights_dir))
        if self.config.inception is not None:
            from models.inception import Inception

            inception = Inception(weights.locate(self.config.inception, self.weights_dir))
        if self.config.aesthetic is not None:
            from models.aesthetic import Aesthetic

            aesthetic = Aesthetic(weights.locate(self.config.aesthetic, self.weights_dir))
        return Extractors(self._features, self._names(), clip, inception, aesthetic)

    def _names(self) -> dict[str, str]:
        def tell(chosen: str | None) -> str:
            return chosen if chosen in weights.TABLE else "own weights"

        return {
            "encode": FEATURES,
            "clip": f"CLIP ({tell(self.config.clip)})",
            "inception": f"Inception-v3 ({tell(self.config.inception)}) of pictures scaled to 299x299",
            "aesthetic": f"aesthetic predictor ({tell(self.config.aesthetic)})",
        }

    def _features(self, images: list[np.ndarray]) -> np.ndarray:
        import torch

        stacked = np.stack([cover(image, self.config.width_px, self.config.height_px) for image in images])
        tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255
        return self._encoder.encode(tensor.to(self._device)).mean(dim=1).cpu().numpy()

    @cached_property
    def _device(self) -> str:
        from models.pretrained import choose_device

        return choose_device(None)

    @cached_property
    def _encoder(self) -> "ImageEncoder":
        from models.image_encoder import open_image_encoder

        return open_image_encoder("dinov2_small", self.weights_dir, self._device)

    @cached_property
    def _face_models(self) -> "FaceModels":
        return self.config.face_models.open(self.weights_dir)

    def _identify(self, jpeg: bytes) -> np.ndarray:
        """Identity embeddings of the faces in a picture."""
        from models.face_embedder import align_face

        image = _decode(jpeg, "generated picture")
        found = self._face_models.detect(image, self.config.face_score)
        chips = [align_face(image, points) for points in found.landmarks]
        return self._face_models.identify(image, found.landmarks, chips)

    def _measure_long_term(
        self, pictures: list[Row] | None, dream: list[Row] | None, faces: FilmFaces, advance: Callable[[int], None]
    ) -> Number:
        """LT: whether the faces that the story asks for are found in its pictures."""
        from models.metrics import found_within

        if pictures is None or dream is None:
            return LONG_TERM.missing("no artifact 'pictures' or 'dream'")
        if not any(row["face_embeddings"] for row in dream):
            return LONG_TERM.missing("no character with a face: the story's frames carry no face embedding")
        expected = find_expected(dream, faces)
        if not any(expected.values()):
            return LONG_TERM.missing("no character with a face that the ingested films know")
        centers = {name: faces.center(name) for name in set(faces.characters)}
        hits = []
        for row in pictures:
            wanted = expected.get(row["frame_index"])
            found = self._identify(row["jpeg"]) if wanted else None
            hits += [found_within(found, centers[name][None], self.config.identity_distance) for name in wanted or ()]
            advance(1)
        if not hits:
            return LONG_TERM.missing("no picture of a frame that asks for a character's face")
        return LONG_TERM.computed(
            float(np.mean(hits)),
            f"{sum(hits)} of {len(hits)} pairs of frame and character; {self.config.face_models.detector} with score "
            f"from {self.config.face_score}, {self.config.face_models.identity} identity with distance to the "
            f"character's mean up to {self.config.identity_distance}",
        )


def read_retrieval(metrics: dict[str, Any] | None) -> Number:
    """What the autoencoder's training measured."""
    if metrics is None:
        return RETRIEVAL.missing("no metrics of an autoencoder")
    with_what = f"{metrics['keyframes']} keyframes; {metrics['retrieval_definition']}"
    return RETRIEVAL.computed(metrics["retrieval_top1"], with_what)


def read_likelihoods(metrics: dict[str, Any] | None) -> list[Number]:
    """What the autoregressive model's training measured on held-out keyframes."""
    numbers = []
    for key, measure in LIKELIHOODS.items():
        value = (metrics or {}).get(key)
        if metrics is None or value is None:
            absent = "no metrics of an autoregressive model" if metrics is None else "no held-out keyframes"
            numbers.append(measure.missing(absent))
        else:
            numbers.append(measure.computed(value, f"{metrics.get('measured_frames')} held-out keyframes"))
    return numbers


def read_film_faces(shards: list[Path]) -> tuple[FilmFaces, int]:
    """The faces of all characters in the shards, and the number of keyframes."""
    from models.samples import read_samples

    characters, conditioning, identities, count = [], [], [], 0
    for sample in read_samples(shards):
        count += 1
        about = sample["json"]
        for index, face in enumerate(about["faces"]):
            if face["character_index"] is not None:
                characters.append((about["film_id"], face["character_index"]))
                conditioning.append(sample["faces.npy"][index])
                identities.append(sample["identities.npy"][index])
    return FilmFaces(characters, np.array(conditioning), np.array(identities)), count


def find_expected(dream: list[Row], faces: FilmFaces) -> dict[int, set[tuple[str, int]]]:
    """For each frame of the story the characters whose faces it was conditioned on.

    The story's faces are recognised as the films' own by their conditioning embeddings.
    """
    from models.metrics import pairwise_cosine

    expected: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for row in dream:
        if not row["face_embeddings"] or not faces.characters:
            continue
        wanted = np.array(row["face_embeddings"], np.float32).reshape(-1, faces.conditioning.shape[1])
        cosines = pairwise_cosine(wanted, faces.conditioning)
        for best, cosine in zip(cosines.argmax(axis=1), cosines.max(axis=1), strict=True):
            if cosine >= SAME_FACE_COSINE:
                expected[row["frame_index"]].add(faces.characters[best])
    return expected


def cover(image: np.ndarray, width_px: int, height_px: int) -> np.ndarray:
    """Crop a picture around its middle to the shape of a size, and scale it to that size."""
    import cv2

    height, width = image.shape[:2]
    scale = max(width_px / width, height_px / height)
    kept_width, kept_height = min(width, round(width_px / scale)), min(height, round(height_px / scale))
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    kept = image[top : top + kept_height, left : left + kept_width]
    return cv2.resize(kept, (width_px, height_px), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _read_rows(inputs: Inputs, role: str, columns: list[str]) -> list[Row] | None:
    paths = inputs.get(role)
    return pq.read_table(paths[0], columns=columns).sort_by("frame_index").to_pylist() if paths else None


def _read_metrics(inputs: Inputs, role: str) -> dict[str, Any] | None:
    found = [path for path in inputs.get(role, ()) if path.name == "metrics.json"]
    return json.loads(found[0].read_text()) if found else None


def _read_keyframes(shards: list[Path], stride: int) -> Iterator[bytes]:
    from models.samples import read_samples

    return (sample["jpg"] for sample in itertools.islice(read_samples(shards), 0, None, stride))


def _decode(jpeg: bytes, what: str) -> np.ndarray:
    from models.pictures import decode_picture

    image = decode_picture(jpeg)
    if image is None:
        raise ComputationError(f"a {what} of {len(jpeg)} bytes is not a JPEG that can be decoded: make it again")
    return image


class _Steps:
    """Counts what is done of a total."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def of(self, message: str) -> Callable[[int], None]:
        """Counts one kind of step."""
        return partial(self._advance, message)

    def _advance(self, message: str, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total, message)
