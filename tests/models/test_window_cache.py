"""The cache of a window against attention written out position by position, and what its windows hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaModel

from models.language_model import build_language_model
from models.window_cache import EMPTY, Places, Window, WindowCache, join_places
from tests.models.test_autoregressive import TRUNK

pytestmark = pytest.mark.usefixtures("one_thread")

Context = list[tuple[int, int]]
"""What an entry attends to: pairs of entry and position."""


def slow_trunk(trunk: LlamaModel, inputs: Tensor, contexts: list[Context], positions: list[int]) -> Tensor:
    """The trunk's output at each entry, each attending to its own context; every pair is rotated by itself."""
    heads, groups = trunk.config.num_attention_heads, trunk.layers[0].self_attn.num_key_value_groups
    count, width = len(inputs), trunk.layers[0].self_attn.head_dim
    distances, blocked = torch.zeros(count, count, dtype=torch.long), torch.ones(count, count, dtype=torch.bool)
    for row, (context, position) in enumerate(zip(contexts, positions, strict=True)):
        entries, places = (torch.tensor(part) for part in zip(*context, strict=True))
        distances[row, entries] = places - position
        blocked[row, entries] = False
    turns = rotation(distances, width, trunk.config.rope_parameters["rope_theta"]).unsqueeze(2)
    for layer in trunk.layers:
        own = layer.self_attn
        states = layer.input_layernorm(inputs)
        queries = own.q_proj(states).view(count, heads, width)
        keys, values = (
            part(states).view(count, heads // groups, width).repeat_interleave(groups, 1)
            for part in (own.k_proj, own.v_proj)
        )
        turned = turns * as_complex(keys)
        scores = (as_complex(queries).conj().unsqueeze(1) * turned).sum(-1).real / width**0.5
        weights = scores.masked_fill(blocked.unsqueeze(-1), -torch.inf).softmax(1).to(values.dtype)
        inputs = inputs + own.o_proj(torch.einsum("qkh,khd->qhd", weights, values).flatten(1))
        inputs = inputs + layer.mlp(layer.post_attention_layernorm(inputs))
    return trunk.norm(inputs)


def as_complex(vectors: Tensor) -> Tensor:
    """The pairs of numbers that a rotary embedding turns, in double precision."""
    first, second = vectors.double().chunk(2, -1)
    return torch.complex(first, second)


def rotation(distances: Tensor, width: int, theta: float) -> Tensor:
    """By what a rotary embedding multiplies these pairs at a distance."""
    frequencies = theta ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.polar(torch.ones(1, dtype=torch.float64), distances.unsqueeze(-1) * frequencies)


def make_trunk() -> LlamaModel:
    torch.manual_seed(0)
    return build_language_model(TRUNK | {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class SlowWindow:
    """The entries that a sliding window keeps, as a list."""

    def __init__(self) -> None:
        self.entries: list[int] = []
        self.contexts: list[Context] = []
        self.positions: list[int] = []

    def read(self, count: int) -> None:
        for _ in range(count):
            self.entries.append(len(self.contexts))
            self.contexts.append([(entry, position) for position, entry in enumerate(self.entries)])
            self.positions.append(len(self.entries) - 1)

    def drop(self, sinks: int, count: int) -> None:
        del self.entries[sinks : sinks + count]


@torch.no_grad()
@pytest.mark.parametrize("sinks", [1, 5])
def test_a_window_that_slides_for_many_laps_equals_attention_written_out(sinks: int) -> None:
    trunk, inputs = make_trunk(), draw(240, 24)
    window, slow = Window(25, sinks), SlowWindow()
    cache = WindowCache(trunk, 1, 26, sinks)
    outputs, laps = [], 0

    def read(count: int) -> None:
        places = join_places([window.read(count)], np.stack)
        outputs.append(cache.read(inputs[None, len(slow.contexts) :][:, :count], places)[0])
        slow.read(count)

    read(19)
    for step in range(45):
        dropped = 3 + step % 3
        back = window.drop(dropped)
        laps += back > 0
        cache.slide([window], np.array([back]))
        slow.drop(sinks, dropped)
        read(dropped)
    assert laps > 5
    expected = slow_trunk(trunk, inputs[: len(slow.contexts)], slow.contexts, slow.positions)
    torch.testing.assert_close(torch.cat(outputs), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_stories_of_one_batch_slide_by_themselves() -> None:
    """Different sinks, different amounts, at different times; what the other stories do changes nothing."""
    trunk = make_trunk()
    sinks, slots = [2, 4, 0], 20

    def run(rows: list[int]) -> Tensor:
        windows = [Window(slots, sinks[row]) for row in rows]
        cache = WindowCache(trunk, len(rows), slots + 1, max(sinks[row] for row in rows))
        outputs = []
        for step in range(40):
            back = np.zeros(len(rows), np.int64)
            if step > 8:
                back = np.array([w.drop(2) if (step + row) % 3 else 0 for w, row in zip(windows, rows, strict=True)])
                cache.slide(windows, back)
            counts = [2 if step <= 8 or (step + row) % 3 else 0 for row in rows]
            places = [window.read(count).padded(2) for window, count in zip(windows, counts, strict=True)]
            inputs = torch.stack([draw(2, 24, seed=100 * row + step) for row in rows])
            outputs.append(cache.read(inputs, join_places(places, np.stack)) * torch.tensor(counts)[:, None, None])
        return torch.stack(outputs)

    together = run([0, 1, 2])
    assert torch.isfinite(together).all()
    for row in range(3):
        torch.testing.assert_close(together[:, row], run([row])[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_read_aside_is_seen_by_nothing_else() -> None:
    """Entries 4 and 6 are read twice; the second time, they do not see 3 to 7 but themselves."""
    trunk, inputs = make_trunk(), draw(10, 24)
    window, cache = Window(12, 0, behind=4), WindowCache(trunk, 1, 16)

    def read(*parts: Places, entries: list[int]) -> Tensor:
        places = join_places([join_places(parts, np.concatenate)], np.stack)
        return cache.read(inputs[None, entries], places)[0]

    read(window.read(4), entries=[0, 1, 2, 3])
    main = window.read(4)
    found = read(main, window.read_aside(main.positions[[0, 2]]), entries=[4, 5, 6, 7, 4, 6])
    one = window.read(1)
    more = read(one, window.read_aside(one.positions), entries=[8, 8])
    window.forget_aside()
    last = read(window.read(1), entries=[9])
    main_entries, aside = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 6, 8]
    contexts = [[(e, e) for e in main_entries[: i + 1]] for i in main_entries]
    contexts += [[(e, e) for e in range(4)] + [(10 + e, aside[e]) for e in range(i + 1)] for i in range(3)]
    expected = slow_trunk(trunk, inputs[main_entries + aside], contexts, main_entries + aside)
    torch.testing.assert_close(found, expected[[4, 5, 6, 7, 10, 11]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(more, expected[[8, 12]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, expected[[9]], atol=1e-5, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    slots=st.integers(8, 40),
    sinks=st.integers(0, 6),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=60),
)
def test_a_window_holds_what_was_not_dropped(slots: int, sinks: int, lengths: list[int]) -> None:
    """Each kept entry has a slot of its own, in order and without gaps once the sinks are turned."""
    window, kept, held, taken = Window(slots + sinks, sinks), {}, [], 0
    if sinks:
        kept |= {int(slot): entry for entry, slot in enumerate(window.read(sinks).slots)}
    for length in lengths:
        while sum(held) + length > slots:
            window.drop(held[0])
            oldest = sorted(entry for entry in kept.values() if entry >= sinks)[: held.pop(0)]
            kept = {slot: entry for slot, entry in kept.items() if entry not in oldest}
        places = window.read(length)
        for slot in places.slots:
            assert int(slot) not in kept
            kept[int(slot)] = sinks + taken
            taken += 1
        held.append(length)
        positions = window.positions()
        assert set(np.flatnonzero(positions != EMPTY)) == set(kept)
        turned = {slot: int(positions[slot]) + (window.shift if slot < sinks else 0) for slot in kept}
        in_order = [turned[slot] for slot in sorted(kept, key=kept.__getitem__)]
        assert in_order == list(range(window.shift, window.shift + len(kept)))
        assert places.positions.max() < 2 * (slots + sinks)
        assert places.seen[:, : len(positions)].sum(1).tolist() == [len(kept) - length + n + 1 for n in range(length)]


def test_memory_is_allocated_once() -> None:
    trunk, window = make_trunk(), Window(20, 2)
    cache = WindowCache(trunk, 1, 21, 2)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    size = cache.byte_count
    assert size == 4 * 2 * 2 * 6 * (21 + 21 + 2)  # float32, layers, key heads, width, keys + values + sinks
    for step in range(12):
        if step > 1:
            cache.slide([window], np.array([window.drop(8)]))
        cache.read(draw(1, 8, 24), join_places([window.read(8)], np.stack))
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
    assert cache.byte_count == size


def test_the_trunk_can_be_compiled_without_a_break() -> None:
    """One graph serves all passes of one width, whatever the window holds."""
    trunk, inputs = make_trunk(), draw(1, 60, 24)
    graphs = []

    def keep(graph: torch.fx.GraphModule, examples: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def run(forward: torch.nn.Module) -> Tensor:
        window, cache, outputs = Window(12, 2), WindowCache(trunk, 1, 13, 2), []
        cache._trunk = forward
        for step in range(20):
            if step > 3:
                cache.slide([window], np.array([window.drop(3)]))
            outputs.append(cache.read(inputs[:, 3 * step :][:, :3], join_places([window.read(3)], np.stack)))
        return torch.cat(outputs, 1)

    compiled = torch.compile(trunk, backend=keep, fullgraph=True, dynamic=False)
    torch.testing.assert_close(run(compiled), run(trunk), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
