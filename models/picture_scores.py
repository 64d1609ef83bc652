"""Scores of a story's pictures, whoever made them: what looks at them, and the numbers of what it saw.

Dimensions: picture; dim = width of a feature; label = classes of Inception-v3.

Source: section 4.2 of the paper, tables 1 and 2. DINOv2's numbers stand beside CLIP's and Inception's under names of
their own, so that nobody compares the two.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray

from models.measures import (
    AESTHETIC,
    CLIP_SCORE,
    CLIP_SHORT_TERM,
    CLIP_SIMILARITY,
    FID,
    FRECHET,
    FRECHET_FLOOR,
    INCEPTION_SCORE,
    SHORT_TERM,
    SIMILARITY,
    Measure,
    Number,
)
from models.metrics import adjacent_cosine, check_finite, clip_score, frechet_distance, mask_shared, measure_moments

Picture = UInt8[ndarray, "height width 3"]
Advance = Callable[[int], None]
"""Told how many pictures were looked at since the last time."""

NO_PICTURES = "no artifact 'pictures'"
COMPARED = ("keyframes of the films", "generated pictures")
SPLIT_SEED = 0


class PictureText(Protocol):
    """What puts pictures and texts into one space: `models.clip.Clip`."""

    def embed_pictures(self, pictures: Sequence[Picture]) -> Float32[ndarray, "picture dim"]: ...
    def embed_texts(self, texts: Sequence[str]) -> Float32[ndarray, "text dim"]: ...
    def count_cut(self, texts: Sequence[str]) -> int: ...


Encode = Callable[[Sequence[Picture]], Float32[ndarray, "picture dim"]]
Classify = Callable[[Sequence[Picture]], tuple[Float32[ndarray, "picture dim"], Float32[ndarray, "picture label"]]]
Rate = Callable[[Float32[ndarray, "picture dim"]], Float32[ndarray, " picture"]]


@dataclass(frozen=True)
class Features:
    """What was seen in pictures, a row a picture; None where nothing looked.

    Attributes:
        dino: By the encoder that every profile has.
        clip: CLIP's picture embeddings, of length 1.
        inception: Pooled features of Inception-v3.
        logits: Its labels, before the softmax.
    """

    dino: Float32[ndarray, "picture dim"]
    clip: Float32[ndarray, "picture dim"] | None = None
    inception: Float32[ndarray, "picture dim"] | None = None
    logits: Float32[ndarray, "picture label"] | None = None


@dataclass(frozen=True)
class Extractors:
    """What looks at pictures; None where its weights are not available.

    Attributes:
        encode: Pictures to DINOv2 features.
        clip: Pictures and texts to embeddings of one space.
        inception: Pictures to features and logits of Inception-v3 (`models.inception.Inception`).
        aesthetic: CLIP embeddings to ratings (`models.aesthetic.Aesthetic`).
        names: What is said of each beside its numbers, by attribute.
    """

    encode: Encode
    names: Mapping[str, str]
    clip: PictureText | None = None
    inception: Classify | None = None
    aesthetic: Rate | None = None

    def look(self, pictures: Iterable[Picture], batch: int, advance: Advance, with_clip: bool = True) -> Features:
        """Look at pictures, `batch` at a time. Keyframes of films need no CLIP embedding."""
        found: dict[str, list[ndarray]] = {"dino": [], "clip": [], "inception": [], "logits": []}
        remaining = iter(pictures)
        while some := list(itertools.islice(remaining, batch)):
            found["dino"].append(self.encode(some))
            if self.clip and with_clip:
                found["clip"].append(self.clip.embed_pictures(some))
            if self.inception:
                features, logits = self.inception(some)
                found["inception"].append(features)
                found["logits"].append(logits)
            advance(len(some))
        stacked = {name: np.concatenate(rows) for name, rows in found.items() if rows}
        return Features(**{"dino": np.zeros((0, 1), np.float32)} | stacked)


def score_pictures(
    pictures: Iterable[Picture],
    scripts: Sequence[str] | None,
    extractors: Extractors,
    real: Features,
    batch: int,
    advance: Advance,
) -> list[Number]:
    """Every number of the paper's tables that pictures alone give (all but LT), and DINOv2's beside them.

    Args:
        pictures: RGB, one a frame of the story, in order.
        scripts: The frames' scripts (JSON of `FrameScript`), in the same order; None where there are no pictures.
        extractors: What looks at the pictures.
        real: What was seen in keyframes of the films, for FID and FD-DINOv2.
        batch: Pictures looked at together.
        advance: Told of each batch.

    Raises:
        ValueError: There are more or fewer pictures than scripts.
    """
    seen = extractors.look(pictures, batch, advance)
    told = None if scripts is None else [json.loads(script) for script in scripts]
    if len(seen.dino) != len(told or ()):
        raise ValueError(f"{len(seen.dino)} pictures and {len(told or ())} scripts: each frame needs one of both")
    dino = extractors.names["encode"]
    return [
        measure_short_term(SHORT_TERM, told, seen.dino, dino),
        measure_similarity(SIMILARITY, seen.dino, dino),
        measure_frechet(real.dino, seen.dino, dino),
        measure_frechet_floor(real.dino, dino),
        *_score_by_clip(told, seen, extractors),
        *_score_by_inception(real, seen, extractors),
    ]


def _score_by_clip(told: list[dict[str, Any]] | None, seen: Features, extractors: Extractors) -> list[Number]:
    measures = (CLIP_SCORE, CLIP_SHORT_TERM, CLIP_SIMILARITY)
    if extractors.clip is None:
        needs = [_needs(measure, "CLIP") for measure in measures]
        return [*needs, _needs(AESTHETIC, "CLIP and aesthetic predictor")]
    if told is None or seen.clip is None:
        return [measure.missing(NO_PICTURES) for measure in (*measures, AESTHETIC)]
    name = extractors.names["clip"]
    return [
        measure_clip_score(told, seen.clip, extractors.clip, name),
        measure_short_term(CLIP_SHORT_TERM, told, seen.clip, name),
        measure_similarity(CLIP_SIMILARITY, seen.clip, name),
        _rate(seen.clip, extractors),
    ]


def _score_by_inception(real: Features, seen: Features, extractors: Extractors) -> list[Number]:
    if extractors.inception is None:
        return [_needs(measure, "Inception-v3") for measure in (FID, INCEPTION_SCORE)]
    if seen.inception is None or seen.logits is None:
        return [measure.missing(NO_PICTURES) for measure in (FID, INCEPTION_SCORE)]
    name = extractors.names["inception"]
    return [measure_fid(real.inception, seen.inception, name), measure_inception_score(seen.logits, name)]


def _needs(measure: Measure, what: str) -> Number:
    return measure.missing(f"not available in this profile: needs {what} weights")


def _rate(embeddings: Float32[ndarray, "picture dim"], extractors: Extractors) -> Number:
    if extractors.aesthetic is None:
        return _needs(AESTHETIC, "aesthetic predictor")
    ratings = extractors.aesthetic(embeddings)
    check_finite(ratings)
    names = f"{extractors.names['aesthetic']} on {extractors.names['clip']}"
    spread = f"ratings from {ratings.min():.2f} to {ratings.max():.2f}"
    return AESTHETIC.computed(float(ratings.mean(dtype=np.float64)), f"{names}; {len(ratings)} pictures, {spread}")


def describe_frame(script: Mapping[str, Any]) -> str:
    """The text of a frame for CLIP: plot, descriptions of characters, scene elements. What comes last is cut first."""
    described = [
        sentence for character in script.get("characters", ()) for sentence in character.get("description", ())
    ]
    return " ".join([*script.get("plot", ()), *described, *script.get("scene_elements", ())])


def measure_clip_score(
    told: Sequence[Mapping[str, Any]], embeddings: Float[ndarray, "picture dim"], clip: PictureText, name: str
) -> Number:
    """CLIP score over all frames whose script says anything."""
    texts = [describe_frame(script) for script in told]
    rows = [row for row, text in enumerate(texts) if text]
    if not rows:
        return CLIP_SCORE.missing("no frame has a script with a sentence")
    spoken = [texts[row] for row in rows]
    value = clip_score(embeddings[rows], clip.embed_texts(spoken))
    silent = f", {len(texts) - len(rows)} without text left out" if len(rows) < len(texts) else ""
    counts = f"{len(rows)} frames{silent}; {clip.count_cut(spoken)} of {len(rows)} texts cut to what CLIP reads"
    return CLIP_SCORE.computed(value, f"{name}; {counts}")


def measure_short_term(
    measure: Measure, told: Sequence[Mapping[str, Any]] | None, features: Float[ndarray, "picture dim"], name: str
) -> Number:
    """ST over all adjacent pictures whose scripts share a character."""
    if told is None:
        return measure.missing(NO_PICTURES)
    shared = mask_shared([{c["identity"] for c in script.get("characters", ())} for script in told])
    if not shared.any():
        return measure.missing("no character stands in the scripts of two adjacent frames")
    cosines = adjacent_cosine(features)[shared]
    return measure.computed(float(cosines.mean()), f"{name}; {len(cosines)} pairs of frames")


def measure_similarity(measure: Measure, features: Float[ndarray, "picture dim"], name: str) -> Number:
    """Mean cosine over all adjacent pictures."""
    if len(features) < 2:
        return measure.missing(f"{len(features)} generated pictures: at least 2 are needed")
    cosines = adjacent_cosine(features)
    return measure.computed(float(cosines.mean()), f"{name}; {len(cosines)} pairs of frames")


def measure_frechet(real: Float[ndarray, "a dim"], generated: Float[ndarray, "b dim"], name: str) -> Number:
    """FD-DINOv2 of the films' keyframes and the generated pictures."""
    return _compare(
        FRECHET, real, generated, ("keyframes of the films", "generated pictures"), name, _gaussian_distance
    )


def measure_frechet_floor(real: Float[ndarray, "a dim"], name: str) -> Number:
    """FD-DINOv2 of the even and the odd keyframes of the films: what nothing but sampling gives."""
    return _compare(FRECHET_FLOOR, real[::2], real[1::2], ("even keyframes", "odd keyframes"), name, _gaussian_distance)


def measure_fid(real: Float[ndarray, "a dim"] | None, generated: Float[ndarray, "b dim"], name: str) -> Number:
    """FID of the films' keyframes and the generated pictures, by torchmetrics."""
    from models.inception_metrics import frechet_inception_distance

    real = generated[:0] if real is None else real
    return _compare(FID, real, generated, COMPARED, f"{name}, torchmetrics", frechet_inception_distance)


def _gaussian_distance(first: ndarray, second: ndarray) -> float:
    return frechet_distance(*measure_moments(first), *measure_moments(second))


def _compare(
    measure: Measure,
    first: ndarray,
    second: ndarray,
    names: tuple[str, str],
    made_by: str,
    distance: Callable[[ndarray, ndarray], float],
) -> Number:
    counts = f"{len(first)} {names[0]}, {len(second)} {names[1]}"
    if min(len(first), len(second)) < 2:
        return measure.missing(f"{counts}: at least 2 of each are needed")
    few = min(len(first), len(second)) <= first.shape[1]
    caveat = f"; fewer samples than the {first.shape[1]} features, so the value is biased and no absolute measure"
    return measure.computed(distance(first, second), f"{made_by}; {counts}{caveat if few else ''}")


def measure_inception_score(logits: Float[ndarray, "picture label"], name: str) -> Number:
    """Inception score of the generated pictures."""
    from models.inception_metrics import SPLITS, inception_score

    if len(logits) < 2 * SPLITS:
        return INCEPTION_SCORE.missing(f"{len(logits)} generated pictures: {SPLITS} splits need at least {2 * SPLITS}")
    mean, deviation = inception_score(logits, SPLIT_SEED)
    per_split = len(logits) / SPLITS
    few = f"; {per_split:.0f} pictures a split, which bounds the score" if per_split < logits.shape[1] else ""
    told = f"{name}; {len(logits)} pictures in {SPLITS} splits, standard deviation {deviation:.3g}"
    return INCEPTION_SCORE.computed(mean, told + few)
