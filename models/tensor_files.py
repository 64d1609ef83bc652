"""Tensors of one upstream file: safetensors, or a pickle that is read with the loading of code turned off."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.weights import WeightsError

PATTERNS = ("*.safetensors", "*.pth", "*.pt")


def read_tensors(what: str, place: Path) -> dict[str, Tensor]:
    """Name to tensor, of a file, or of the only such file in a folder.

    Args:
        what: Their name in the error.
        place: The file or its folder.

    Raises:
        WeightsError: There is no such file, or it holds something else than named tensors.
    """
    path = place
    if place.is_dir():
        found = [path for pattern in PATTERNS for path in sorted(place.glob(pattern))]
        if len(found) != 1:
            raise WeightsError(f"{place} holds {len(found)} files of tensors: expected one, with {what}")
        path = found[0]
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise WeightsError(f"{path} cannot be read as {what}: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} cannot be read as {what}: it holds something else than named tensors")
    return state


def load_strictly(what: str, place: Path, module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The module with these tensors, in evaluation mode and without gradients.

    Raises:
        WeightsError: A tensor is missing, too many, or of another shape; the message tells the first.
    """
    try:
        module.load_state_dict(dict(state))  # without the versions that torch keeps beside it: old files lack counts
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise WeightsError(f"{place} is not {what}: {' '.join(lines[1:2])[:300]}") from error
    return module.requires_grad_(False).eval()


def _unpickle(path: Path) -> dict[str, Tensor]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
