"""Pipelines of diffusers from local folders, and what the baselines ask of them all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.pretrained import choose_device
from models.weights import WeightsError

Precision = Literal["float16", "float32"]

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, message)`, once a step of sampling."""


@dataclass(frozen=True)
class Sampling:
    """How pictures or videos are sampled.

    Attributes:
        steps: Of the sampler.
        guidance: Scale of classifier-free guidance; up to 1 is none.
        width_px: Of the pictures, a multiple of 8.
        height_px: Of the pictures, a multiple of 8.
        seed: Of everything random.
    """

    steps: int
    guidance: float
    width_px: int
    height_px: int
    seed: int

    def generator(self, number: int) -> torch.Generator:
        """Randomness of one picture, window or clip, on the CPU whatever the device."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)


def load_pipeline(
    what: str, family: Any, folder: Path, precision: Precision, device: str | None, **parts: Callable[[], Any]
) -> Any:
    """A pipeline from a folder in the Hugging Face layout.

    Args:
        what: Its name in the error.
        family: The pipeline's class.
        folder: Its folders of models, with safetensors, whole or in the variant fp16.
        precision: In what it computes; float16 is slow on a CPU.
        device: Where it goes; None takes an accelerator where there is one.
        parts: Makers of parts that are not taken from the folder as they are; a maker of None leaves a part out.

    Raises:
        WeightsError: The folder lacks a part.
    """
    device = choose_device(device)
    try:
        made = {name: make() for name, make in parts.items()}
        pipeline = family.from_pretrained(folder, **loading(folder, getattr(torch, precision)), **made)
        _require_words(pipeline, folder)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"no {what} at {folder}: {first}; bring all folders of the pipeline, with safetensors"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _require_words(pipeline: Any, folder: Path) -> None:
    """A tokenizer whose files are not there is made without any word, and without an error."""
    for name in pipeline.components:
        own = folder / name
        if name.startswith("tokenizer") and not any(
            (own / file).is_file() for file in ("vocab.json", "tokenizer.json")
        ):
            raise OSError(f"{own} holds neither vocab.json nor tokenizer.json")


def loading(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` for local files; files in half precision are taken where there are some."""
    variant = "fp16" if any(folder.rglob("*.fp16.safetensors")) else None
    return {
        "local_files_only": True,
        "use_safetensors": True,
        "low_cpu_mem_usage": False,
        "dtype": dtype,
        "variant": variant,
    }


def count_tokens(pipeline: Any, text: str) -> int:
    """Tokens of a text, without start and end."""
    return len(pipeline.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


@torch.no_grad()
def decode(pipeline: Any, latents: Float[Tensor, "channel row column"]) -> Float[Tensor, "3 height width"]:
    """The RGB picture in 0..1 of latents."""
    vae = pipeline.vae
    image = vae.decode(latents[None].to(vae.device, vae.dtype) / vae.config.scaling_factor).sample[0]
    return (image / 2 + 0.5).clamp(0, 1)
