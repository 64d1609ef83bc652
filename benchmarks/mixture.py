"""The mixture loss against torch's `MixtureSameFamily`: the same value, how many times as fast, how much memory.

    python benchmarks/mixture.py [--tokens 512] [--components 16] [--dim 1024] [--device cpu] [--repetitions 7] [--json]

Both get the same logits, locations and scales, and do a forward and a backward pass; in turns, after one of each that
is not counted. Memory is what autograd keeps between the two passes, beside its inputs: the tensors that it saves, each
storage once. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.gmm import Mixture

PEER = "torch.distributions.MixtureSameFamily"
Density = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(logits: Tensor, locations: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """Log density of each token."""
    return Mixture(logits, locations, scales).log_prob(values)


def peer(logits: Tensor, locations: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """The same by torch."""
    components = Independent(Normal(locations, scales, validate_args=False), 1, validate_args=False)
    weights = Categorical(logits=logits, validate_args=False)
    return MixtureSameFamily(weights, components, validate_args=False).log_prob(values)


def step(density: Density, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The mean log density, and its gradients."""
    mean = density(*inputs).mean()
    return mean, list(torch.autograd.grad(mean, inputs[:3]))


def time_step(density: Density, inputs: list[Tensor]) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    step(density, inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def count_saved(density: Density, inputs: list[Tensor]) -> int:
    """Bytes that autograd keeps between the passes."""
    saved: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = density(*inputs)
    del kept
    return sum(saved.values())


def measure(tokens: int, components: int, dim: int, device: str, repetitions: int) -> dict[str, Any]:
    """Both sides, in turns."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    inputs = [draw(tokens, components), draw(tokens, components, dim), draw(tokens, components, dim).exp()]
    inputs = [tensor.requires_grad_() for tensor in inputs] + [draw(tokens, dim)]
    (value, gradients), (peer_value, peer_gradients) = step(ours, inputs), step(peer, inputs)
    exact, exact_gradients = step(peer, [tensor.detach().double().requires_grad_() for tensor in inputs])
    pairs = [(time_step(ours, inputs), time_step(peer, inputs)) for _ in range(repetitions)]
    saved, peer_saved = count_saved(ours, inputs), count_saved(peer, inputs)

    def error(found: list[Tensor]) -> float:
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact_gradients, strict=True))

    return {
        "ratio": round(statistics.median(peer_s / our_s for our_s, peer_s in pairs), 2),
        "peer": PEER,
        "ours_s": statistics.median(our_s for our_s, _ in pairs),
        "peer_s": statistics.median(peer_s for _, peer_s in pairs),
        "relative_error": abs(float(value.detach() / exact.detach() - 1)),
        "peer_relative_error": abs(float(peer_value.detach() / exact.detach() - 1)),
        "gradient_error": error(gradients),
        "peer_gradient_error": error(peer_gradients),
        "saved_mb": saved / 1e6,
        "peer_saved_mb": peer_saved / 1e6,
        "memory_ratio": round(peer_saved / saved, 2),
        "tokens": tokens,
        "components": components,
        "dim": dim,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Parse the call, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    call = parser.parse_args()
    result = measure(call.tokens, call.components, call.dim, call.device, call.repetitions)
    if not call.json:
        print(f"{result['ratio']} times as fast as {PEER}, {result['memory_ratio']} times less kept")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
