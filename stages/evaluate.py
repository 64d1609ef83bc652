"""Measures what a run generated and learned, each number beside its definition.

Consistency of the generated pictures (ST, LT, DINO-sim), their likeness to the films (FD-DINOv2), and what training
measured (reconstruction retrieval, held-out likelihood). A number whose inputs or weights are not there is null, and
its `computed_with` says why.

Source: section 4.2 of the paper, tables 1 and 2. The paper's CLIP features are DINOv2's here, under names of their own,
so that nobody compares the two.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from models.measures import (
    FRECHET,
    FRECHET_FLOOR,
    LIKELIHOODS,
    LONG_TERM,
    RETRIEVAL,
    SHORT_TERM,
    SIMILARITY,
    UNAVAILABLE,
    Measure,
    Number,
)
from stages.errors import ComputationError
from stages.face_choice import FaceChoice
from stages.spec import Inputs, Progress, Row, StageConfig, StageSpec, neutral

if TYPE_CHECKING:
    from models.face_models import FaceModels
    from models.image_encoder import DinoV2

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
    batch: int = neutral(8, "Pictures encoded at once.", ge=1)

    def weights(self) -> tuple[str, ...]:
        """The feature space, and the face models of LT."""
        return tuple(dict.fromkeys(("dinov2_small", *self.face_models.weights())))

    def recipe(self) -> dict[str, Any]:
        """Weights enter by what they hold, not by where they lie."""
        return super().recipe() | {"face_models": self.face_models.recipe()}


SPEC = StageSpec(
    name="evaluate",
    version=1,
    implementation="stages.evaluate:Evaluate",
    inputs=("pictures", "dream", "shards", "autoencoder", "autoregressive"),
    output="evaluation",
    scope="set",
    cpus=2.0,
    description="consistency, likeness to the films, and what training measured",
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
            ComputationError: A picture cannot be decoded.
        """
        pictures = _read_rows(inputs, "pictures", ["frame_index", "script", "jpeg"])
        dream = _read_rows(inputs, "dream", ["frame_index", "face_embeddings"])
        shards = [path for path in inputs.get("shards", ()) if path.suffix == ".tar"]
        faces, keyframe_count = read_film_faces(shards)
        stride = -(-keyframe_count // self.config.real_keyframes) or 1
        steps = _Steps(progress, 2 * len(pictures or ()) + len(range(0, keyframe_count, stride)))

        generated = self._encode((row["jpeg"] for row in pictures or ()), "generated picture", steps)
        numbers = [
            measure_short_term(pictures, generated),
            self._measure_long_term(pictures, dream, faces, steps),
            measure_similarity(generated),
        ]
        real = self._encode(_read_keyframes(shards, stride), "keyframe of a film", steps)
        numbers += [measure_frechet(real, generated), measure_frechet_floor(real)]
        numbers += [read_retrieval(_read_metrics(inputs, "autoencoder"))]
        numbers += read_likelihoods(_read_metrics(inputs, "autoregressive"))
        numbers += list_unavailable()
        text = json.dumps([asdict(number) for number in numbers], indent=1, allow_nan=False)
        (out / "evaluation.json").write_text(text + "\n")
        return {number.name: number.value for number in numbers}

    def _encode(self, jpegs: Iterator[bytes], what: str, steps: "_Steps") -> np.ndarray:
        """Features, one row a picture; the encoder is loaded if there is a picture."""
        features = []
        while batch := list(itertools.islice(jpegs, self.config.batch)):
            features.append(self._features([_decode(jpeg, what) for jpeg in batch]))
            steps.advance(len(batch), f"encode {what}s")
        return np.concatenate(features) if features else np.zeros((0, 1), np.float32)

    def _features(self, images: list[np.ndarray]) -> np.ndarray:
        import torch

        stacked = np.stack([cover(image, self.config.width_px, self.config.height_px) for image in images])
        tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255
        return self._encoder.encode(tensor).mean(dim=1).numpy()

    @cached_property
    def _encoder(self) -> "DinoV2":
        from models.image_encoder import DinoV2

        return DinoV2(self.weights_dir)

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
        self, pictures: list[Row] | None, dream: list[Row] | None, faces: FilmFaces, steps: "_Steps"
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
            steps.advance(1, "look for the characters")
        if not hits:
            return LONG_TERM.missing("no picture of a frame that asks for a character's face")
        return LONG_TERM.computed(
            float(np.mean(hits)),
            f"{sum(hits)} of {len(hits)} pairs of frame and character; {self.config.face_models.detector} with score "
            f"from {self.config.face_score}, {self.config.face_models.identity} identity with distance to the "
            f"character's mean up to {self.config.identity_distance}",
        )


def measure_short_term(pictures: list[Row] | None, features: np.ndarray) -> Number:
    """ST over all adjacent pictures whose scripts share a character."""
    from models.metrics import adjacent_cosine, mask_shared

    if pictures is None:
        return SHORT_TERM.missing("no artifact 'pictures'")
    names = [{c["identity"] for c in json.loads(row["script"]).get("characters", ())} for row in pictures]
    shared = mask_shared(names)
    if not shared.any():
        return SHORT_TERM.missing("no character stands in the scripts of two adjacent frames")
    cosines = adjacent_cosine(features)[shared]
    return SHORT_TERM.computed(float(cosines.mean()), f"{FEATURES}; {len(cosines)} pairs of frames")


def measure_similarity(features: np.ndarray) -> Number:
    """DINO-sim over all adjacent pictures."""
    from models.metrics import adjacent_cosine

    if len(features) < 2:
        return SIMILARITY.missing(f"{len(features)} generated pictures: at least 2 are needed")
    cosines = adjacent_cosine(features)
    return SIMILARITY.computed(float(cosines.mean()), f"{FEATURES}; {len(cosines)} pairs of frames")


def measure_frechet(real: np.ndarray, generated: np.ndarray) -> Number:
    """FD-DINOv2 of the films' keyframes and the generated pictures."""
    return _compare(FRECHET, real, generated, "keyframes of the films", "generated pictures")


def measure_frechet_floor(real: np.ndarray) -> Number:
    """FD-DINOv2 of the even and the odd keyframes of the films: what nothing but sampling gives."""
    return _compare(FRECHET_FLOOR, real[::2], real[1::2], "even keyframes", "odd keyframes")


def _compare(measure: Measure, first: np.ndarray, second: np.ndarray, first_name: str, second_name: str) -> Number:
    from models.metrics import frechet_distance, measure_moments

    counts = f"{len(first)} {first_name}, {len(second)} {second_name}"
    if min(len(first), len(second)) < 2:
        return measure.missing(f"{counts}: at least 2 of each are needed")
    few = min(len(first), len(second)) <= first.shape[1]
    caveat = f"; fewer samples than the {first.shape[1]} features, so the value is biased and no absolute measure"
    value = frechet_distance(*measure_moments(first), *measure_moments(second))
    return measure.computed(value, f"{FEATURES}; {counts}{caveat if few else ''}")


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
            numbers.append(measure.computed(value, f"{metrics.get('heldout_frames')} held-out keyframes"))
    return numbers


def list_unavailable() -> list[Number]:
    """The paper's numbers that need weights which no package carries."""
    return [measure.missing(f"not available in this profile: needs {name} weights") for name, measure in UNAVAILABLE]


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
    import cv2

    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) if jpeg else None
    if image is None:
        raise ComputationError(f"a {what} of {len(jpeg)} bytes is not a JPEG that can be decoded: make it again")
    return image


class _Steps:
    """Counts what is done of a total."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, count: int, message: str) -> None:
        self._done += count
        self._progress(self._done, self._total, message)
