"""Models of transformers and diffusers from a local folder, and the device on which adapters run."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

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
        WeightsError: The folder lacks one of them, or some of the model's weights.
    """
    try:
        with _without_reports():
            model, found = family.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            others = [part.from_pretrained(folder, local_files_only=True) for part in parts]
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"no {what} at {folder}: {str(error).strip().splitlines()[0]}") from error
    _insist_on_all(what, folder, found["missing_keys"])
    return [model.eval().to(device), *others]


def _insist_on_all(what: str, folder: Path, missing: Collection[str]) -> None:
    """What a file lacks would be left as it happened to lie in memory.

    Raises:
        WeightsError: Something is missing.
    """
    if missing:
        first = min(missing)
        raise WeightsError(f"the {what} at {folder} lacks {len(missing)} weights, such as {first}: get it again")


@contextmanager
def _without_reports() -> Iterator[None]:
    """No word on weights that a folder holds beside those of the model: CLIP's texts where its eyes are wanted."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # a bar for each load would tear the stage's own
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_diffusers(what: str, folder: Path, family: Any) -> Any:
    """A model of diffusers in float32; its half-precision files are taken where there are no others.

    Args:
        what: Its name in the error.
        folder: Its own folder of a pipeline, with config.json and safetensors.
        family: The model's class.

    Raises:
        WeightsError: The folder lacks it.
    """
    halves = bool(list(folder.glob("*.fp16.safetensors")))
    wholes = any(not path.name.endswith(".fp16.safetensors") for path in folder.glob("*.safetensors"))
    variant = "fp16" if halves and not wholes else None
    try:
        model, found = family.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, variant=variant,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"no {what} at {folder}: {str(error).strip().splitlines()[0]}") from error
    _insist_on_all(what, folder, found["missing_keys"])
    return model


def read_diffusers_config(what: str, folder: Path, family: Any) -> dict[str, Any]:
    """The configuration of a model of diffusers, from which its class builds it with fresh weights.

    Raises:
        WeightsError: The folder lacks it.
    """
    try:
        return family.load_config(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"no {what} at {folder}: {str(error).strip().splitlines()[0]}") from error
