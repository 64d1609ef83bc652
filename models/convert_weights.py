"""Makes safetensors of an upstream pickle: `python -m models.convert_weights NAME SOURCE TARGET`.

A process of its own, which `models.hub_weights` starts: what a pickle could do, it would do here, and it is read with
the loading of code turned off.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LONG_POSITIONS = 248
KEPT_POSITIONS = 20
"""Positions that LongCLIP leaves as CLIP has them; the others are trained anew."""


def convert_farl(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The picture side, under its upstream names."""
    found = {name.removeprefix("module."): value for name, value in state.items()}
    return {name: value for name, value in found.items() if name.startswith("visual.")}


def convert_longclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text side, with its one table of positions put together from the checkpoint's two.

    Source: facts of the upstream code: rows up to 20 come from `positional_embedding`, the others from the trained
    `positional_embedding_res`. A checkpoint without the second has lost them.

    Raises:
        ValueError: It has no second table.
    """
    if "positional_embedding_res" not in state:
        raise ValueError("there is no positional_embedding_res: the trained positions are lost, take the upstream file")
    positions = state["positional_embedding_res"].clone()
    positions[:KEPT_POSITIONS] = state["positional_embedding"][:KEPT_POSITIONS]
    dropped = ("visual.", "positional_embedding")
    kept = {name: value for name, value in state.items() if not name.startswith(dropped) and value.dim()}
    return kept | {"positional_embedding": positions}


def convert_inception(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that the network reads; batch normalization's counts are for training."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def convert_aesthetic(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers."""
    return {name: value for name, value in state.items() if name.startswith("layers.")}


CONVERTERS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "farl": convert_farl,
    "longclip_l": convert_longclip,
    "inception_fid": convert_inception,
    "aesthetic_l14": convert_aesthetic,
}


def convert(name: str, source: Path, target: Path) -> None:
    """Read a pickle of tensors and write what is used of it.

    Raises:
        ValueError: It does not hold what its name says.
    """
    loaded = torch.load(source, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded)
    kept = {key: value.contiguous().clone() for key, value in CONVERTERS[name](state).items()}
    if not kept:
        raise ValueError(f"{source} holds nothing of {name}")
    save_file(kept, target)


if __name__ == "__main__":
    convert(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
