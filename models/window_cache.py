"""Keys and values of the positions that the story model still sees, in tensors that are allocated once.

`Window` decides, for one story, which slot of the cache a position takes and which slots are seen: the first positions
stay (attention sinks), the others form a ring from which the oldest fall out. `WindowCache` holds the keys and values
of several stories and reads on; its shapes never change, whatever the windows hold.

Rotary embeddings see differences of positions alone. So where a position falls out nothing is moved but the sinks: they
are turned forward until they stand right before the oldest other position that is kept, and all distances are those of
positions 0 to n - 1. After each lap of the ring all positions go back by a lap, so that they never grow large.

Dimensions: story = row of the batch, slot = place in the cache, entry = what one pass reads of a story, layer, head,
width = of a key, hidden = width of the trunk.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023 (arXiv 2309.17453).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, LlamaModel
from transformers.cache_utils import CacheLayerMixin
from transformers.models.llama.modeling_llama import rotate_half

EMPTY = np.iinfo(np.int64).max
"""Position of a slot that holds nothing to be seen: later than any that looks."""


@dataclass(frozen=True)
class Places:
    """Where the entries of one pass stand.

    Attributes:
        slots: Where their keys and values go.
        positions: In the order of reading.
        seen: Which slots each entry attends to, itself among them.
    """

    slots: Int[np.ndarray, "*story entry"]
    positions: Int[np.ndarray, "*story entry"]
    seen: Bool[np.ndarray, "*story entry slot"]

    def padded(self, count: int) -> "Places":
        """Filled up with entries that go to the last slot and see something, so that no attention is undefined."""
        pad = (0, count - len(self.slots))
        slots = np.pad(self.slots, pad, constant_values=self.seen.shape[-1] - 1)
        return Places(slots, np.pad(self.positions, pad), np.pad(self.seen, (pad, (0, 0)), constant_values=True))


def join_places(parts: Sequence[Places], join: Callable[..., np.ndarray]) -> Places:
    """Several as one: `np.stack` makes stories a batch, `np.concatenate` lays entries after others."""
    return Places(*(join(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))


class Window:
    """Which slots one story's positions take. Positions count up from 0.

    Args:
        slots: How many there are for positions.
        sinks: Positions that stay, from the first on; less than `slots`.
        behind: Slots behind these. All but the last are for what is read aside; the last takes padding, and nothing
            ever sees it.
    """

    def __init__(self, slots: int, sinks: int = 0, behind: int = 1) -> None:
        self.sinks, self.lap = sinks, slots - sinks
        self._first, self._end = sinks, 0
        self._aside = np.full(behind, EMPTY)

    @property
    def shift(self) -> int:
        """By how many positions the sinks are to be turned forward."""
        return self._first - self.sinks

    def read(self, count: int) -> Places:
        """Places of the next positions, each of which sees all that are kept and not later."""
        assert self._end + count - self._first <= self.lap, "more positions than slots"
        self._end += count
        positions = np.arange(self._end - count, self._end)
        ring = self.sinks + (positions - self.sinks) % self.lap
        held = np.concatenate([self.positions(), np.full_like(self._aside, EMPTY)])
        return Places(np.where(positions < self.sinks, positions, ring), positions, held <= positions[:, None])

    def read_aside(self, positions: Int[np.ndarray, " entry"]) -> Places:
        """Places of positions that are read once more, beside the first time.

        They see each other, and what lies before the first of them; nothing else ever sees them.
        """
        used = int((self._aside != EMPTY).sum())
        slots = self.sinks + self.lap + used + np.arange(len(positions))
        self._aside[used : used + len(positions)] = positions
        held = self.positions()
        before = np.concatenate([np.where(held < self._aside[0], held, EMPTY), self._aside])
        return Places(slots, positions, before <= positions[:, None])

    def forget_aside(self) -> None:
        """Empty the slots of what was read aside."""
        self._aside[:] = EMPTY

    def drop(self, count: int) -> int:
        """Let the oldest positions after the sinks fall out; by how much all others have gone back for it."""
        assert self._first + count <= self._end, "more positions to drop than there are"
        self._first += count
        back = self.lap if self.shift >= self.lap else 0
        self._first, self._end = self._first - back, self._end - back
        return back

    def positions(self) -> Int[np.ndarray, " slot"]:
        """What each slot for positions holds: one of them, or `EMPTY`."""
        sinks = np.arange(self.sinks)
        newest = self._end - 1 - (self._end - 1 - self.sinks - np.arange(self.lap)) % self.lap
        kept = (np.where(sinks < self._end, sinks, EMPTY), np.where(newest >= self._first, newest, EMPTY))
        return np.concatenate(kept)


class WindowCache(Cache):
    """Keys and values of several stories, in the trunk's type and on its device.

    Args:
        trunk: Reads; in evaluation mode.
        stories: How many.
        slots: Of each story.
        sinks: The most slots of a story that are turned while others fall out; 0 where nothing falls out.
    """

    def __init__(self, trunk: LlamaModel, stories: int, slots: int, sinks: int = 0) -> None:
        config = trunk.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, stories, config.num_key_value_heads, slots, width)
        self._trunk = trunk
        self._keys = torch.zeros(shape, dtype=trunk.dtype, device=trunk.device)
        self._values = torch.zeros_like(self._keys)
        # As they were read: turning what was turned before would add up rounding errors.
        self._sink_keys = torch.zeros_like(self._keys[:, :, :, :sinks])
        self._turned = np.zeros(stories, bool)
        super().__init__(layers=[_Layer(*layer) for layer in zip(self._keys, self._values, strict=True)])

    @property
    def byte_count(self) -> int:
        """Bytes that it holds, now and always."""
        return sum(tensor.nbytes for tensor in (self._keys, self._values, self._sink_keys))

    @torch.no_grad()
    def read(
        self,
        inputs: Float[Tensor, "story entry hidden"],
        places: Places,
    ) -> Float[Tensor, "story entry hidden"]:
        """Read entries and keep them.

        Args:
            inputs: What to read.
            places: Of all stories.

        Returns:
            The trunk's output in the type of `inputs`.
        """
        device, dtype = self._keys.device, self._keys.dtype
        slots = torch.from_numpy(places.slots).to(device)[:, None, :, None]
        for layer in self.layers:
            layer.slots = slots.expand(-1, self._keys.shape[2], -1, self._keys.shape[-1])
        # Additive, because eager attention misreads a boolean mask.
        blocked = ~torch.from_numpy(places.seen).to(device).unsqueeze(1)
        mask = torch.zeros(blocked.shape, dtype=dtype, device=device).masked_fill(blocked, torch.finfo(dtype).min)
        output = self._trunk(
            inputs_embeds=inputs.to(dtype),
            position_ids=torch.from_numpy(places.positions).to(device),
            attention_mask=mask,
            past_key_values=self,
            use_cache=True,
        )
        return output.last_hidden_state.to(inputs.dtype)

    @torch.no_grad()
    def slide(self, windows: Sequence[Window], back: Int[np.ndarray, " story"]) -> None:
        """Turn keys after positions fell out of windows.

        Args:
            windows: Of all stories.
            back: What `Window.drop` returned for each; 0 where nothing fell out.
        """
        shifts = np.array([window.shift for window in windows])
        for row in np.flatnonzero((shifts > 0) & ~self._turned):
            self._sink_keys[:, row] = self._keys[:, row, :, : self._sink_keys.shape[3]]
            self._turned[row] = True
        if back.any():
            for keys in self._keys:  # one by one, for the memory that it takes
                keys.copy_(self._turn(keys, -back))
        turned = self._turn(self._sink_keys, shifts)
        counts = torch.tensor([window.sinks for window in windows])
        own = torch.arange(turned.shape[3]) < counts.unsqueeze(-1)
        own &= torch.from_numpy(self._turned).unsqueeze(-1)
        sinks = self._keys[:, :, :, : turned.shape[3]]
        sinks.copy_(torch.where(own[:, None, :, None].to(sinks.device), turned, sinks))

    def _turn(self, keys: Tensor, steps: Int[np.ndarray, " story"]) -> Tensor:
        """Keys of each story as they are that many positions later; those of 0 steps bit for bit as they are."""
        rotary = self._trunk.rotary_emb
        exact = keys.float()
        cos, sin = rotary(exact, torch.from_numpy(steps).to(keys.device).unsqueeze(-1))
        cos, sin = (part.unsqueeze(-2) / rotary.attention_scaling for part in (cos, sin))
        return (exact * cos + rotate_half(exact) * sin).to(keys.dtype)


class _Layer(CacheLayerMixin):
    """One layer's keys and values; attention gets all of them, and a mask that says which count."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Float[Tensor, "story head slot width"], values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.slots: Int[Tensor, "story head entry width"]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.scatter_(2, self.slots, key_states)
        self.values.scatter_(2, self.slots, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return self.keys.shape[2]
