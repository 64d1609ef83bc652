"""Checkpoints that several processes write together and any other number of them can read.

Below a folder of checkpoints each one is a folder of its own: `state.json`, small things as JSON, and tensors as
PyTorch's distributed checkpoint writes them, a file for each process. It is written beside and then renamed, so a
checkpoint is whole or not there. The newest is kept. Processes on several hosts must share the folder's file system.

The index of the tensors (`.metadata`) is a pickle, so a checkpoint must not come from anyone else: it belongs into a
scratch folder, and what is shared is written in another format.

Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from models.processes import process_count, process_index, wait_for_all

STATE = "state.json"
UNFINISHED = ".part"


def save_checkpoint(folder: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint and remove the older ones; all processes have to call it.

    Args:
        folder: Of checkpoints.
        name: Sorts after the names of earlier ones. Nothing is written where it is there already.
        tensors: By name, sharded or not; those that are not are the same in all processes.
        state: JSON values, the same in all processes.
    """
    path, part = folder / name, folder / f"{name}{UNFINISHED}"
    if path.is_dir():
        return
    wait_for_all()  # so that none sees the new folder while another still has to ask
    if process_index() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / STATE).write_text(json.dumps(state), encoding="utf-8")
    wait_for_all()
    with _alone():
        dcp.save(tensors, storage_writer=FileSystemWriter(part), no_dist=process_count() == 1)
    if process_index() == 0:
        part.rename(path)
        for older in folder.iterdir():
            if older != path:
                shutil.rmtree(older)
    wait_for_all()


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the last name, if there is any."""
    found = [path for path in folder.glob("*") if path.is_dir() and path.suffix != UNFINISHED]
    return max(found, default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def tensor_names(checkpoint: Path) -> set[str]:
    """Names of the tensors in a checkpoint."""
    return set(FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def load_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors with those of the same names; they keep their layout and how they are sharded.

    Raises:
        CheckpointException: A name is not there, or its size is another.
    """
    with _alone():
        dcp.load(tensors, storage_reader=FileSystemReader(checkpoint), no_dist=process_count() == 1)


class _alone(warnings.catch_warnings):
    """Where a single process needs no warning that it is one."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
