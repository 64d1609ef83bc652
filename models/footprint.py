"""What a network needs, without having it: parameters, memory and arithmetic, measured on tensors that hold nothing.

The network's own code runs on PyTorch's fake tensors, which have shapes and types and no bytes, so seven billion
parameters take no memory. Memory is that of tensors: what an allocator loses between them, and what kernels keep for
themselves, comes on top. Kernels are those that a CPU would choose, whose attention, as the accelerators', never
holds all pairs of positions.

Source: torch._subclasses.fake_tensor and torch.utils.flop_counter; FSDP2's accounting in
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.initialization import no_init_weights

from models.processes import Precision

Model = TypeVar("Model", bound=nn.Module)
aten = torch.ops.aten

MAX_KNOWN = 1 << 23
"""Bytes of the largest tensor whose values are followed."""
FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number."""


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Formulas by operation: PyTorch's, and the same for the attention that CPUs choose, which it leaves out."""


@dataclass(frozen=True)
class Footprint:
    """What one run of a network needs.

    Attributes:
        parameters: Numbers that are learned, each counted once.
        parameter_bytes: What they take.
        resident_bytes: All that is there before the run: parameters, buffers, an optimizer's state.
        peak_bytes: Most that is there at once during the run; None where only parameters could be counted.
        flops: Floating-point operations of matrix products, convolutions and attention, a multiplication and an
            addition being two; None as above.
        outputs: Type and shape of each tensor that the run returns, such as `float32[1, 768]`.
        state_bytes, gathered_bytes: Of a training step, what the functions of these names give for its model.
    """

    parameters: int
    parameter_bytes: int
    resident_bytes: int
    peak_bytes: int | None
    flops: int | None
    outputs: tuple[str, ...] = ()
    state_bytes: int = 0
    gathered_bytes: int = 0

    @property
    def working_bytes(self) -> int:
        """What the run takes beyond what was there before it."""
        return 0 if self.peak_bytes is None else self.peak_bytes - self.resident_bytes


class Tracker(TorchDispatchMode):
    """Follows which tensors are alive, and counts arithmetic, from the operations that it sees.

    Attributes:
        flops: Of all operations since the tracker began; see `Footprint`.
        live_bytes: Of all storages that an operation gave since the tracker began, and that are still there.
        peak_bytes: Most of them at once since `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, weakref.ref] = {}
        self.flops = self.live_bytes = self.peak_bytes = 0

    def reset_peak(self) -> None:
        """Forget what was there at once before."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        self._note(func, args, kwargs, outputs)
        return outputs

    def _note(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        if (formula := FLOPS.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=outputs)
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return

        def drop(_: Any) -> None:
            del self._live[key]
            self.live_bytes -= size

        self._live[key] = weakref.ref(storage, drop)
        self.live_bytes += size


class FakeRun(Tracker):
    """A tracker over fake tensors that also knows the values of small ones that follow from the program alone.

    A fake tensor has no values, so code that asks for one (which positions hold a frame token, how large a picture's
    grid is) could not run. Such values come from constants and counts, never from weights or random numbers, so they
    are computed beside, on real tensors.
    """

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self._fakes = fakes
        self._known = WeakTensorKeyDictionary()
        self._outdated: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.index.Tensor:
            args = (args[0], self._count_chosen(args[1]), *args[2:])
        values = self._values_of(func, (args, kwargs))
        try:
            outputs, real = func(*args, **kwargs), None
        except (DataDependentOutputException, DynamicOutputShapeException):
            if values is None:
                raise
            real = _compute(func, *values)
            outputs = tree_map_only(Tensor, self._fakes.from_tensor, real)
        self._note(func, args, kwargs, outputs)
        if real is None and values is not None and _is_small(outputs):
            real = _compute(func, *values)
        self._remember(func, args, outputs, real)
        return outputs

    def _count_chosen(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Masks among indices, replaced by the positions that they choose."""
        found: list[Tensor | None] = []
        for index in indices:
            known = None if index is None else self._value(index)
            if known is not None and known.dtype is torch.bool:
                with _disable_current_modes():
                    found += known.nonzero(as_tuple=True)
            else:
                found.append(index)
        return found

    def _value(self, tensor: Tensor) -> Tensor | None:
        real = self._known.get(tensor) if isinstance(tensor, FakeTensor) else tensor
        if real is None:
            return None
        outdated = self._outdated.get(real.untyped_storage()._cdata)
        return real if outdated is None or outdated() is None else None

    def _values_of(self, func: Any, arguments: Any) -> Any:
        """The arguments with real tensors; None where one is not known, or where the result would not follow."""
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.name():
            return None
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if any(self._value(tensor) is None for tensor in tensors):
            return None
        return tree_map_only(Tensor, self._value, arguments)

    def _remember(self, func: Any, args: Any, outputs: Any, real: Any) -> None:
        if real is None:
            written = [value for slot, value in zip(func._schema.arguments, args, strict=False) if slot.is_write]
            for tensor in tree_leaves(written):
                if isinstance(tensor, FakeTensor) and (known := self._known.get(tensor)) is not None:
                    storage = known.untyped_storage()
                    self._outdated[storage._cdata] = weakref.ref(storage)
        if real is not None:
            for fake, value in zip(tree_leaves(outputs), tree_leaves(real), strict=True):
                if isinstance(fake, FakeTensor):
                    self._known[fake] = value


def _is_small(outputs: Any) -> bool:
    return all(
        leaf.untyped_storage().nbytes() <= MAX_KNOWN for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)
    )


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    with _disable_current_modes(), torch.no_grad():
        return func(*args, **kwargs)


def measure(build: Callable[[], Model], run: Callable[[Model], Any]) -> Footprint:
    """Build a network and run it once, both on fake tensors.

    Args:
        build: Gives the network, with all that is there before the run.
        run: What is measured; its tensors are the outputs.

    Returns:
        With the network's `states` and `gathered`, where it has them.

    Raises:
        DataDependentOutputException, DynamicOutputShapeException: The network asks for a value that follows from
            weights or random numbers.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), fakes, FakeRun(fakes) as tracker:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by copies of parameters
        with no_init_weights(), _replaced_conversion():
            model = build()
        tracker.reset_peak()
        resident, before = tracker.live_bytes, tracker.flops
        outputs = run(model)
        described = tuple(_describe(leaf) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
        flops = tracker.flops - before
        kept = getattr(model, "states", 0), getattr(model, "gathered", 0)
        return Footprint(*count_parameters(model), resident, tracker.peak_bytes, flops, described, *kept)


@contextmanager
def _replaced_conversion() -> Iterator[None]:
    """Let modules change types by `_convert`."""
    own = nn.Module._apply
    nn.Module._apply = _convert
    try:
        yield
    finally:
        nn.Module._apply = own


def _convert(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for fake parameters, which cannot change their type in place: new ones are made."""
    for child in module.children() if recurse else ():
        _convert(child, change)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            changed = None if tensor is None else change(tensor.detach())
            if changed is not None and (changed.dtype, changed.device) != (tensor.dtype, tensor.device):
                trained = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(changed, tensor.requires_grad) if trained else changed
    return module


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters there are, and the bytes that they take."""
    sizes = [(p.numel(), p.numel() * p.element_size()) for p in model.parameters()]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def state_bytes(trained: int, frozen: int = 0, average: bool = False) -> int:
    """What training keeps of a model between steps, and its gradients: all in float32.

    Args:
        trained: Parameters that are trained: weight, gradient and AdamW's two moments of each.
        frozen: Parameters that are not.
        average: Whether there is a moving average of those that are trained.
    """
    return FLOAT32 * ((4 + average) * trained + frozen)


def gathered_bytes(largest_layer: int, rest: int, precision: Precision) -> int:
    """What a process of several holds whole for a while: FSDP2 gathers layer by layer.

    Args:
        largest_layer: Parameters of the largest layer. Two are there at once, since the next one is fetched while one
            runs, and the gradient of one.
        rest: Parameters outside the layers, which stay gathered throughout a step, in float32, with their gradients.
        precision: In which layers are gathered.
    """
    width = BFLOAT16 if precision == "bfloat16" else FLOAT32
    return (2 * width + FLOAT32) * largest_layer + 2 * FLOAT32 * rest


def sharded_bytes(states: int, gathered: int, working: int, processes: int) -> int:
    """Memory that each of several accelerators needs for a training step.

    Args:
        states: See `state_bytes`.
        gathered: See `gathered_bytes`.
        working: Activations of one micro-batch.
        processes: Accelerators.
    """
    return -(-states // processes) + gathered + working
