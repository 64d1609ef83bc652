"""A keyframe to motion of any length: clips chained from last frame to first, under the keyframe's own feature.

Without the anchor errors pile up from clip to clip. How far frames drifted all the same is measured as the cosine
between the image encoder's features of a clip's last frame and of the keyframe.

Dimensions: height, width in pixels; dim = width of the image encoder's space.

Source: section 3.5 of the paper. Measuring the drift, and starting anew where it is too large, are ours.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from models.frame_interpolation import Interpolator
from models.video_diffusion import ClipSettings, VideoDiffusion

Picture = UInt8[np.ndarray, "height width 3"]


class Frame(NamedTuple):
    """A frame, and whether there is a cut between it and the one before."""

    picture: Picture
    cut: bool = False


@dataclass(frozen=True)
class ChainedClip:
    """What is told of a clip.

    Attributes:
        begins: `keyframe`: the first; `last_frame`: at the last frame of the one before; `anchor`: at the keyframe
            again, because the one before had drifted.
        position: Where its first frame stands, in the model's frames since the keyframe.
        seed: Of its noise.
        similarity: Cosine between the features of its last frame and of the keyframe, -1..1.
    """

    begins: Literal["keyframe", "last_frame", "anchor"]
    position: int
    seed: int
    similarity: float


def chain_clips(
    model: VideoDiffusion,
    keyframe: Picture,
    settings: ClipSettings,
    *,
    seed: int,
    reanchor_below: float | None,
    made: list[ChainedClip],
    report: Callable[[int, int], None] = lambda clip, step: None,
) -> Iterator[Frame]:
    """The keyframe as it is, and then without end what follows; a clip is made when its first frame is asked for.

    A clip that goes on from another leaves its own first frame out, which shows the same. One that starts anew at the
    keyframe comes after a cut, with all its frames.

    Args:
        model: Makes the clips.
        keyframe: RGB.
        settings: Of each clip.
        seed: Of the first clip; each further one takes the next.
        reanchor_below: Drift from which a chain starts anew at the keyframe; None never does.
        made: Told of each clip.
        report: Called with the clip's number, from 0, and the count of its finished denoising steps.
    """
    yield Frame(keyframe)
    anchor, start, begins, position = model.embed(keyframe), keyframe, "keyframe", 0
    while True:
        number = len(made)
        frames = model.generate(start, anchor, settings, seed + number, lambda step, n=number: report(n, step))
        similarity = compare(anchor, model.embed(frames[-1]))
        made.append(ChainedClip(begins, position, seed + number, similarity))
        kept = frames if begins == "anchor" else frames[1:]
        for place, frame in enumerate(kept):
            yield Frame(frame, cut=begins == "anchor" and place == 0)
        drifted = reanchor_below is not None and similarity < reanchor_below
        start, begins = (keyframe, "anchor") if drifted else (frames[-1], "last_frame")
        position += len(frames) if drifted else len(frames) - 1


def compare(first: Float32[np.ndarray, " dim"], second: Float32[np.ndarray, " dim"]) -> float:
    """The cosine between two features, -1..1; 0 where one has no length."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.clip(a @ b / lengths, -1, 1)) if lengths else 0.0


def sample_frames(frames: Iterator[Frame], times: Sequence[float]) -> Iterator[Picture]:
    """Pictures at given times out of evenly spaced frames, by optical flow between two of them.

    No more frames are taken than the times need. Before a cut, the last frame stands.

    Args:
        frames: The first is at time 0, the next at 1.
        times: Ascending, from 0.
    """
    start, first, second, between = 0, next(frames).picture, None, None
    for time in times:
        while start + 1 <= time:
            first = (second or next(frames)).picture
            start, second, between = start + 1, None, None
        if time == start:
            yield first
            continue
        if second is None:
            second = next(frames)
            between = None if second.cut else Interpolator(first, second.picture)
        yield between.at(time - start) if between else first
