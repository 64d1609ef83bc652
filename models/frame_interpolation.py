"""Pictures between two keyframes, by dense optical flow.

Dimensions: height, width in pixels; flow holds (x, y) displacements in pixels.

Each keyframe is pushed along its own flow to the wanted moment, and the two are blended: the nearer keyframe counts
more, and a pixel counts less where forward and backward flow
disagree or lead to another brightness. Where neither can be trusted, the picture
falls back to a plain cross-blend; where the flow of the whole pair is poor (a cut, a fade, no texture), all of it does.
"""

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

MINIMUM_TRUST = 0.4  # below this share of agreeing pixels, warping tears the picture: cross-blend instead
DISAGREEMENT_PX = 1.0  # forward-backward error at which a pixel is half trusted, beyond 10% of the motion itself
DISAGREEMENT_LUMA = 24.0  # difference (of 255) between a pixel and where its flow leads, at which it is half trusted
TRUST_BLUR_PX = 2.0  # feathers the seam between warped and cross-blended regions
FLOW_REDUCTION = 2  # flow is smooth: half the resolution costs a quarter of the time and loses nothing to see
SMALLEST_PX = 16  # the flow finder's patches do not fit into less: such pictures count as still

Picture = UInt8[np.ndarray, "height width 3"]
Gray = UInt8[np.ndarray, "height width"]
Flow = Float32[np.ndarray, "height width 2"]
Map = Float32[np.ndarray, "height width"]


class Interpolator:
    """All pictures between one pair of keyframes; the flow is computed once.

    Source: optical flow by dense inverse search (https://arxiv.org/abs/1603.03590), trust by forward-backward
    consistency. Stands where section 3.5 of the paper uses an image-to-video model.

    Args:
        first: RGB keyframe at time 0.
        last: RGB keyframe at time 1, of the same size.

    Raises:
        ValueError: The sizes differ.
    """

    def __init__(self, first: Picture, last: Picture):
        if first.shape != last.shape:
            raise ValueError(f"keyframes are {first.shape} and {last.shape}: both must have the same size")
        self.first, self.last = first, last
        gray = [reduce(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)) for picture in (first, last)]
        self.forward, self.backward = compute_flow(*gray), compute_flow(*reversed(gray))
        self.first_trust = measure_trust(*gray, self.forward, self.backward)
        self.last_trust = measure_trust(*reversed(gray), self.backward, self.forward)

    @property
    def trust(self) -> float:
        """Share (0..1) of pixels whose flow is consistent, over both directions."""
        return float((self.first_trust.mean() + self.last_trust.mean()) / 2)

    def at(self, time: float) -> Picture:
        """The picture at `time` in 0..1; at 0 and 1 exactly the keyframes.

        Raises:
            ValueError: The time is outside 0..1.
        """
        if not 0 <= time <= 1:
            raise ValueError(f"time is {time}: expected 0 (first keyframe) to 1 (last keyframe)")
        if time in (0, 1):
            return self.last if time else self.first
        blend = cross_blend(self.first, self.last, time)
        if self.trust < MINIMUM_TRUST:
            return blend
        first, first_trust = push(self.first, self.forward, self.first_trust, time)
        last, last_trust = push(self.last, self.backward, self.last_trust, 1 - time)
        trust = cv2.GaussianBlur(np.maximum(first_trust, last_trust), (0, 0), TRUST_BLUR_PX)
        first_weight, last_weight = (1 - time) * first_trust, time * last_trust
        scale = trust / (first_weight + last_weight + 1e-6)
        weights = [enlarge(w, blend)[..., None] for w in (first_weight * scale, last_weight * scale, 1 - trust)]
        return to_bytes(first * weights[0] + last * weights[1] + blend * weights[2])


def cross_blend(first: Picture, last: Picture, time: float) -> Picture:
    """The weighted mean of two pictures: `first` at time 0, `last` at time 1."""
    return to_bytes(first * np.float32(1 - time) + last * np.float32(time))


def compute_flow(first: Gray, last: Gray) -> Flow:
    """Dense optical flow: `first` at p is seen in `last` at p + flow[p]."""
    if min(first.shape) < SMALLEST_PX:
        return np.zeros((*first.shape, 2), np.float32)
    finder = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    finder.setFinestScale(0)
    return finder.calc(first, last, None)


def measure_trust(picture: Gray, target: Gray, flow: Flow, back: Flow) -> Map:
    """How far (0..1) the flow of each pixel of `picture` can be believed.

    High where following `flow` into `target` meets the same brightness, and following `back` from there leads home.
    Pixels that the flow carries out of the picture get 0.
    """
    there_x, there_y = follow(flow)
    height, width = picture.shape
    inside = (there_x > -1) & (there_x < width) & (there_y > -1) & (there_y < height)
    returned = cv2.remap(back, there_x, there_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    seen = cv2.remap(target, there_x, there_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    motion = np.linalg.norm(flow, axis=-1) + np.linalg.norm(returned, axis=-1)
    astray = np.linalg.norm(flow + returned, axis=-1) / (DISAGREEMENT_PX + 0.1 * motion)
    unlike = cv2.absdiff(picture, seen).astype(np.float32) / DISAGREEMENT_LUMA
    return (inside * np.exp2(-(astray**2) - unlike**2)).astype(np.float32)


def push(picture: Picture, flow: Flow, trust: Map, time: float) -> tuple[Float32[np.ndarray, "height width 3"], Map]:
    """Move a picture along `time` (0..1) of its flow.

    The flow is first carried to where it leads at that time (a splat weighted by trust), so that each pixel of the
    result knows where it came from; holes get no trust.

    Args:
        picture: RGB keyframe.
        flow: Its flow, in pixels of the reduced picture.
        trust: Trust of that flow.
        time: How far to move.

    Returns:
        The moved picture, 0..255, and the trust (0..1) of its pixels at the flow's resolution.
    """
    carried, landed = splat(flow, trust, time)
    shift = enlarge(carried, picture) * np.float32(-time * FLOW_REDUCTION)
    moved = cv2.remap(picture, *follow(shift), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return moved.astype(np.float32), np.clip(landed, 0, 1)


def reduce(picture: Gray) -> Gray:
    """Shrink a picture to the flow's resolution."""
    height, width = picture.shape
    size = (max(1, width // FLOW_REDUCTION), max(1, height // FLOW_REDUCTION))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def enlarge(values: np.ndarray, like: Picture) -> np.ndarray:
    """Stretch a map at the flow's resolution to the size of a picture."""
    return cv2.resize(values, (like.shape[1], like.shape[0]), interpolation=cv2.INTER_LINEAR)


def splat(flow: Flow, trust: Map, time: float) -> tuple[Flow, Map]:
    """Carry flow vectors to where they lead at `time`; also the weight (about 0..1) that landed on each pixel."""
    height, width = trust.shape
    to_x, to_y = follow(flow * np.float32(time))
    left, top = np.floor(to_x), np.floor(to_y)
    weighted = np.concatenate([flow * trust[..., None], trust[..., None]], axis=-1).reshape(-1, 3)
    landed = np.zeros((height * width, 3))
    for step_x, step_y in ((0, 0), (1, 0), (0, 1), (1, 1)):
        share = (1 - np.abs(to_x - left - step_x)) * (1 - np.abs(to_y - top - step_y))
        x, y = (left + step_x).astype(np.int64), (top + step_y).astype(np.int64)
        inside = ((x >= 0) & (x < width) & (y >= 0) & (y < height)).ravel()
        index = (y * width + x).ravel()[inside]
        values = (weighted * share.reshape(-1, 1))[inside]
        for channel in range(3):
            landed[:, channel] += np.bincount(index, values[:, channel], height * width)
    landed = landed.reshape(height, width, 3).astype(np.float32)
    # Where nothing landed, the flow of the place itself stands in; the tiny weight changes nothing elsewhere.
    filled = landed + 1e-6 * np.dstack([flow, np.ones_like(trust)])
    return filled[..., :2] / filled[..., 2:], landed[..., 2]


def follow(flow: Flow) -> tuple[Map, Map]:
    """The x and the y coordinates to which each pixel's flow leads."""
    height, width = flow.shape[:2]
    grid_x, grid_y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return grid_x + flow[..., 0], grid_y + flow[..., 1]


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Round 0..255 floats to bytes."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
