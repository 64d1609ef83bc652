"""Models of transformers from a local folder, and the device on which adapters run."""

from pathlib import Path
from typing import Any

import torch

from models.weights import WeightsError


def choose_device(device: str | None) -> str:
    """The device asked for; None takes an accelerator where there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def load_pretrained(what: str, folder: Path, device: str, family: Any, *parts: Any) -> list[Any]:
    """A model in float32 and evaluation mode, and what belongs to it: tokenizer, image processor.

    Args:
        what: Its name in the error.
        folder: In the Hugging Face layout, with safetensors.
        device: Where the model goes.
        family: The model's class.
        parts: Classes of the others.

    Raises:
        WeightsError: The folder lacks one of them.
    """
    try:
        model = family.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        return [model.eval().to(device), *(part.from_pretrained(folder, local_files_only=True) for part in parts)]
    except (OSError, ValueError) as error:
        raise WeightsError(f"no {what} at {folder}: {str(error).strip().splitlines()[0]}") from error
