"""Sampling from the story model: frame after frame, token after token, window after window.

Dimensions: frame, token = tokens a frame, dim = width of a token, hidden = width of the trunk.

Source: the paper, section 3.3 (equation 5, few-shot) and appendix A (128 context frames).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from models.autoregressive import AutoregressiveModel
from models.gmm import Mixture
from models.sequence import Frame, FrameSequence, build_sequence


def generate(
    model: AutoregressiveModel,
    frames: Sequence[Frame],
    *,
    history: Sequence[Frame] = (),
    references: Sequence[Float[np.ndarray, "token dim"]] = (),
    window_frames: int = 128,
    overlap_frames: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Float[np.ndarray, "frame token dim"]:
    """Sample the tokens of frames, one frame after the other.

    When the window is full, a fresh one starts with the references and the last frames made, each with its script,
    and goes on from there; so a story has no greatest length.

    Args:
        model: In evaluation mode.
        frames: Scripts to realise; tokens that they carry are ignored.
        history: Frames with tokens that come before, such as the end of a film that is to be continued.
        references: Tokens of frames whose style and characters to follow (few-shot); none for zero-shot.
        window_frames: Most frames, of history and made, that the model sees at once; at least 1.
        overlap_frames: Most frames that a fresh window takes over; less than `window_frames`.
        temperature: Factor of the components' standard deviations.
        seed: Same arguments and seed, same tokens.
        use_cache: Whether keys and values are kept; results are the same without, only slower.
        progress: Called after each frame with frames made and frames in all.

    Raises:
        ValueError: `overlap_frames` is not less than `window_frames`.

    Source: the paper, section 3.3 (equation 5, few-shot) and appendix A (128 context frames).
    """
    if not 0 <= overlap_frames < window_frames:
        raise ValueError(f"overlap_frames {overlap_frames}: expected 0 to window_frames - 1 = {window_frames - 1}")
    sampler = _Sampler(model, references, temperature, seed, use_cache)
    past = list(history)
    sampler.restart(past[len(past) - min(len(past), overlap_frames) :])
    for index, frame in enumerate(frames):
        if sampler.frame_count == window_frames:
            sampler.restart(past[len(past) - overlap_frames :])
        tokens = sampler.make_frame(frame)
        past.append(replace(frame, tokens=tokens))
        progress(index + 1, len(frames))
    shape = (len(frames), model.config.tokens_per_frame, model.config.token_dim)
    return np.asarray([frame.tokens for frame in past[len(history) :]], np.float32).reshape(shape)


class _Sampler:
    """One window: what the trunk has read so far, and the sampling of the next frame."""

    def __init__(
        self,
        model: AutoregressiveModel,
        references: Sequence[np.ndarray],
        temperature: float,
        seed: int,
        use_cache: bool,
    ) -> None:
        self._model, self._references, self._temperature = model, references, temperature
        self._use_cache = use_cache
        # On the CPU whatever the model's device, so that a seed means the same noise everywhere.
        self._generator = torch.Generator().manual_seed(seed)
        self.frame_count = 0

    def restart(self, frames: Sequence[Frame]) -> None:
        """Begin a window with references and frames that have tokens."""
        self.frame_count = len(frames)
        self._previous = torch.zeros_like(self._model.token_mean)
        if frames:
            last = torch.tensor(np.asarray(frames[-1].tokens, np.float32)).to(self._previous.device)
            self._previous = self._model.standardize(last)
        self._cache = DynamicCache(config=self._model.trunk.config) if self._use_cache else None
        self._read: list[Tensor] = []
        self._unread = [self._embed(build_sequence(frames, self._model.tokenizer, self._references))]

    @torch.no_grad()
    def make_frame(self, frame: Frame) -> Float[np.ndarray, "token dim"]:
        script = replace(frame, tokens=None)
        self._unread.append(self._embed(build_sequence([script], self._model.tokenizer)))
        tokens = []
        for previous in self._previous.split(1):
            mixture = self._model.mixture(self._read_on(), previous)
            mixture = Mixture(mixture.logits.cpu(), mixture.locations.cpu(), mixture.scales.cpu())
            token = mixture.sample(self._generator, self._temperature).to(self._model.token_mean.device)
            self._unread.append(self._model.token_projection(token).unsqueeze(0))
            tokens.append(token)
        self.frame_count += 1
        self._previous = torch.cat(tokens)
        return self._model.unstandardize(self._previous).cpu().numpy()

    def _embed(self, sequence: FrameSequence) -> Tensor:
        with torch.no_grad():
            return self._model.embed(self._model.collate([sequence]))

    def _read_on(self) -> Float[Tensor, "1 hidden"]:
        """Read what is new; the trunk's output at the last position."""
        inputs = torch.cat(self._unread, 1)
        self._unread = []
        if self._cache is None:
            self._read.append(inputs)
            inputs = torch.cat(self._read, 1)
        output = self._model.trunk(inputs_embeds=inputs, past_key_values=self._cache, use_cache=self._use_cache)
        return output.last_hidden_state[:, -1]
