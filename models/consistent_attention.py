"""Pictures by SDXL whose self-attention also sees the other pictures of the story, without any training.

In every self-attention layer of the UNet, a picture's queries stay as they are, and tokens drawn at random from the
other pictures of the batch join its own tokens as keys and values, under the layer's own projections. A story longer
than a batch is painted in overlapping windows: the pictures that a window shares with the one before are not sampled
again, but pass through every step as they were then, so that the new pictures look at them at the same noise level.

Source: StoryDiffusion (https://arxiv.org/abs/2405.01434), section 3.1. There the window slides inside each layer over a
story that is sampled as one batch, and outputs of overlapping windows are averaged; here it slides over the story, so
that memory does not grow with it and finished windows outlive a killed run. Up to one window, the two are the same.

Dimensions: half = 2 with guidance (without and with the prompt), else 1; picture; token; channel.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.diffusers_pipelines import Progress, Sampling, decode
from models.picture_folder import PictureFolder
from models.sdxl_pictures import sample_latents

DRAWS = 500_000
"""Numbers of the generators that draw tokens start here, above those of the frames' noise."""


@dataclass(frozen=True)
class Consistency:
    """How pictures look at each other.

    Attributes:
        sampling_rate: Share of the other pictures' tokens that joins a picture's own; 0 is plain SDXL.
        window_pictures: Pictures sampled together.
        overlap_pictures: Pictures that a window shares with the one before, fewer than it holds.
    """

    sampling_rate: float = 0.5
    window_pictures: int = 12
    overlap_pictures: int = 4


@dataclass(frozen=True)
class Window:
    """Frames `start` to `end`, of which the first `known` were painted in the window before."""

    start: int
    end: int
    known: int


class ConsistentSelfAttention:
    """An attention processor of diffusers for the self-attention layers of a UNet.

    Args:
        pictures: Pictures in a batch, in each of its halves.
        sampling_rate: See `Consistency`.
        generator: Draws the tokens, anew in each call; both halves get the same draw.
    """

    def __init__(self, pictures: int, sampling_rate: float, generator: torch.Generator) -> None:
        self._pictures, self._rate, self._generator = pictures, sampling_rate, generator
        self._attend = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "half*picture token channel"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "half*picture token channel"]:
        """The layer's output; `encoder_hidden_states` is None in self-attention."""
        paired = self.pair(hidden_states)
        return self._attend(attn, hidden_states, paired, attention_mask, temb)

    def pair(
        self, tokens: Float[Tensor, "half*picture token channel"]
    ) -> Float[Tensor, "half*picture paired_token channel"]:
        """Each picture's own tokens, and behind them those drawn from the other pictures."""
        drawn = round(self._rate * (self._pictures - 1) * tokens.shape[1])
        if not drawn:
            return tokens
        halves = tokens.unflatten(0, (-1, self._pictures))
        paired = []
        for picture in range(self._pictures):
            others = torch.cat([halves[:, :picture], halves[:, picture + 1 :]], dim=1).flatten(1, 2)
            chosen = torch.randperm(others.shape[1], generator=self._generator)[:drawn].to(tokens.device)
            paired.append(torch.cat([halves[:, picture], others[:, chosen]], dim=1))
        return torch.stack(paired, dim=1).flatten(0, 1)


def plan_windows(frames: int, consistency: Consistency) -> list[Window]:
    """The windows of a story; every frame is new in exactly one of them."""
    return list(_slide(frames, consistency.window_pictures, consistency.overlap_pictures))


def _slide(frames: int, length: int, overlap: int) -> Iterator[Window]:
    start, known = 0, 0
    while True:
        end = min(frames, start + length)
        yield Window(start, end, known)
        if end == frames:
            return
        start, known = end - overlap, overlap


def paint_consistently(
    pipeline: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    consistency: Consistency,
    pictures: PictureFolder,
    progress: Progress,
) -> None:
    """Paint a story window by window, going on behind the last window that is complete.

    Args:
        pipeline: Of `models.sdxl_pictures.load_sdxl`.
        prompts: One a frame.
        sampling: How.
        consistency: How pictures look at each other.
        pictures: Where they go; beside them go the paths of latents that the next window needs.
        progress: Told after each step.
    """
    windows, known = plan_windows(len(prompts), consistency), None
    for number, window in enumerate(windows):
        message, last = f"window {number + 1} of {len(windows)}", number == len(windows) - 1
        kept = pictures.folder / f"path-{number:06d}.safetensors"
        if not _is_complete(window, pictures) or not (last or kept.is_file()):
            if window.known:
                known = load_file(pictures.folder / f"path-{number - 1:06d}.safetensors")["latents"]

            def tell(step: int, number: int = number, message: str = message) -> None:
                progress(number * sampling.steps + step, len(windows) * sampling.steps, message)

            path = _sample_window(pipeline, prompts, window, known, sampling, consistency.sampling_rate, tell)
            for frame in range(window.start + window.known, window.end):
                pictures.keep(frame, decode(pipeline, path[-1, frame - window.start]))
            if not last:
                temporary = kept.with_suffix(".part")
                save_file({"latents": path[:, -consistency.overlap_pictures :].contiguous().cpu()}, temporary)
                temporary.replace(kept)
    progress(len(windows) * sampling.steps, len(windows) * sampling.steps, "pictures")


def _is_complete(window: Window, pictures: PictureFolder) -> bool:
    return all(frame in pictures for frame in range(window.start, window.end))


def _sample_window(
    pipeline: Any,
    prompts: Sequence[str],
    window: Window,
    known: Float[Tensor, "step known channel row column"] | None,
    sampling: Sampling,
    sampling_rate: float,
    tell: Any,
) -> Float[Tensor, "step picture channel row column"]:
    """The latents of a window's pictures after each step."""
    frames = range(window.start, window.end)
    processor = ConsistentSelfAttention(len(frames), sampling_rate, sampling.generator(DRAWS + window.start))
    path = []

    def step_end(step: int, latents: Tensor) -> Tensor:
        if window.known:
            past = known[step - 1].to(latents.device, latents.dtype)
            latents = torch.cat([past, latents[window.known :]])
        path.append(latents)
        tell(step)
        return latents

    plain = pipeline.unet.attn_processors
    pipeline.unet.set_attn_processor(
        {name: processor if name.endswith("attn1.processor") else own for name, own in plain.items()}
    )
    try:
        sample_latents(pipeline, [prompts[frame] for frame in frames], frames, sampling, step_end)
    finally:
        pipeline.unet.set_attn_processor(plain)
    return torch.stack(path)
