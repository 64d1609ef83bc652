"""Training on one process or on several: who one is, a model spread over all of them, numbers that all agree on.

With one process there is no process group and nothing is sharded; the same calls then do the plain thing. Several
processes share a torch process group (NCCL on accelerators, gloo on CPUs) that whoever started them has set up.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html (FSDP2).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

Precision = Literal["float32", "bfloat16"]
Model = TypeVar("Model", bound=nn.Module)


def process_count() -> int:
    """Processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """The place of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum of each process's values, on all of them."""
    if process_count() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def autocast(device: str, precision: Precision) -> AbstractContextManager:
    """Where matrix products are computed in half precision, if any are; weights stay float32."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def place_model(
    build: Callable[[bool], Model],
    layers: Callable[[Model], Iterable[nn.Module]],
    methods: Sequence[str],
    device: str,
    precision: Precision,
) -> Model:
    """Build a model where it is trained; several processes get a share of each weight.

    Only the first process reads weights, so a host never holds more than one copy of them in memory.

    Args:
        build: Called with True, gives the model with its weights. Called with False, gives one of the same
            architecture whose weights do not matter; that happens with `meta` as the default device.
        layers: The parts that are gathered one at a time while the model runs; all else is gathered once a step.
        methods: Of the model, called in training or measuring in the place of `forward`. What they return must be
            a tensor or a (named) tuple of tensors.
        device: Type of the device, "cpu" or "cuda"; the current one of the type is taken.
        precision: With bfloat16, layers are gathered in half precision. Their inputs are left as they are: run
            them under `autocast`. Gradients are brought together in float32.
    """
    if process_count() == 1:
        return build(True).to(device)
    full = build(True) if process_index() == 0 else None
    with torch.device("meta"):
        model = build(False)
    mesh = init_device_mesh(device, (process_count(),))
    half = torch.bfloat16 if precision == "bfloat16" else None
    in_layers = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=in_layers)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for method in methods:
        register_fsdp_forward_method(model, method)
    model.to_empty(device=device)
    _hand_out(full, model, device)
    # Now, as all of it is trainable: for layers that are frozen when the model first runs, FSDP would never learn in
    # which type to hand back gradients. There is no public way to ask for it.
    model._get_fsdp_state()._lazy_init()
    return model


def _hand_out(full: nn.Module | None, model: nn.Module, device: str) -> None:
    """Fill a sharded model from the first process's whole one."""
    weights = {} if full is None else full.state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    # Buffers that a state dict leaves out, such as the frequencies of rotary positions.
    originals = {} if full is None else dict(full.named_buffers())
    for name, buffer in model.named_buffers():
        if originals:
            buffer.copy_(originals[name])
        dist.broadcast(buffer, src=0)


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as if it had never been sharded, in the CPU's memory.

    All processes have to call it; only the first gets the weights, the others an empty one.
    """
    if process_count() == 1:
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
