"""What each reported number means: name, unit, direction and definition, beside which its value is always shown.

Source: section 4.2 of the paper, tables 1 and 2.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Number:
    """One measure. `value` is None where it could not be computed; `computed_with` then says why."""

    name: str
    value: float | None
    unit: str
    definition: str
    computed_with: str
    better: Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Measure:
    """A number before it has a value."""

    name: str
    unit: str
    better: Literal["higher", "lower"] | None
    definition: str

    def computed(self, value: float, computed_with: str) -> Number:
        """The number with a value."""
        return Number(self.name, value, self.unit, self.definition, computed_with, self.better)

    def missing(self, reason: str) -> Number:
        """The number without one."""
        return Number(self.name, None, self.unit, self.definition, reason, self.better)


SHORT_TERM = Measure(
    "ST (DINOv2)",
    "cosine",
    "higher",
    "Short-term consistency: mean cosine between the features of adjacent generated frames whose scripts share a "
    "character. The paper's ST (table 1) takes CLIP features.",
)
LONG_TERM = Measure(
    "LT",
    "share of frames",
    "higher",
    "Long-term consistency: of the frames that were generated with the face of a character of the films, the share in "
    "which a face is found whose identity embedding lies near that character's mean (table 1). A frame with two "
    "such characters counts twice.",
)
SIMILARITY = Measure(
    "DINO-sim",
    "cosine",
    "higher",
    "Mean cosine between the features of all adjacent generated frames. The paper's CLIP-sim (table 2) takes CLIP "
    "features. Very high values also mean that little happens.",
)
FRECHET = Measure(
    "FD-DINOv2",
    "squared feature units",
    "lower",
    "Frechet distance: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of the means m and unbiased covariances C of the "
    "features of the films' keyframes and of the generated pictures. FID is the same in Inception features.",
)
FRECHET_FLOOR = Measure(
    "FD-DINOv2 of the films with themselves",
    "squared feature units",
    None,
    "The same distance between every other keyframe of the films and the rest: what sampling alone gives, to read "
    "FD-DINOv2 against.",
)
RETRIEVAL = Measure(
    "reconstruction retrieval, top 1",
    "share of keyframes",
    "higher",
    "Share of keyframes whose reconstruction by the autoencoder lies nearest, by cosine of features, to its own "
    "keyframe among all keyframes of its film.",
)
NATS = "nats a token dimension"
LIKELIHOODS = {
    "nll": Measure(
        "held-out NLL",
        NATS,
        "lower",
        "Mean negative log-likelihood of the tokens of keyframes that training never saw, given their scripts and the "
        "frames before (equations 2 to 8).",
    ),
    "nll_scripts_shuffled": Measure(
        "held-out NLL, scripts shuffled",
        NATS,
        None,
        "The same with each frame given another held-out frame's script: worse, if the model reads its scripts.",
    ),
    "nll_gaussian_full": Measure(
        "held-out NLL, one Gaussian",
        NATS,
        None,
        "The same tokens under a single Gaussian with full covariance fitted to the training tokens: worse, if "
        "the model learned more than their spread.",
    ),
}
CLIP_SCORE = Measure(
    "CLIP score",
    "100 * cosine",
    "higher",
    "Mean over frames of 100 times the cosine between the CLIP embeddings of picture and text, at least 0, as "
    "torchmetrics defines it (tables 1 and 2). The text is the frame's script: plot, then descriptions of characters, "
    "then scene elements; what is longer than CLIP reads, 77 tokens for OpenAI's, is cut off.",
)
CLIP_SHORT_TERM = Measure(
    "ST",
    "cosine",
    "higher",
    "Short-term consistency: mean cosine between the CLIP picture embeddings of adjacent generated frames whose "
    "scripts share a character (table 1).",
)
CLIP_SIMILARITY = Measure(
    "CLIP-sim",
    "cosine",
    "higher",
    "Mean cosine between the CLIP picture embeddings of all adjacent generated frames (table 2, of the same keyframes "
    "as table 1). Very high values also mean that little happens.",
)
AESTHETIC = Measure(
    "aesthetic score",
    "rating, about 1 to 10",
    "higher",
    "Mean rating by LAION's improved aesthetic predictor, a linear model of human taste on CLIP ViT-L/14 picture "
    "embeddings of length 1 (tables 1 and 2).",
)
INCEPTION_SCORE = Measure(
    "IS",
    "",
    "higher",
    "Inception score: exponential of the mean KL divergence of a picture's labels, by Inception-v3 with 1008 classes, "
    "from the mean labels of its split; mean of 10 shuffled splits (tables 1 and 2). Few pictures make it small.",
)
FID = Measure(
    "FID",
    "squared feature units",
    "lower",
    "Frechet distance, as in FD-DINOv2, in the 2048 features of Inception-v3's last pooling, of the films' keyframes "
    "and the generated pictures (table 1). The paper's values of about 2 are not comparable with it: which features "
    "they rest on is not told, and 2048 features give far larger distances.",
)
