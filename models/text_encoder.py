"""Sentence embeddings: one vector for one description.

Dimensions: sentence = sentences asked for, text = width of an embedding.

Source: the paper, section 3.3 and appendix A (each description becomes one token, LongCLIP's [CLS]). What the paper
calls [CLS] is CLIP's output at the end-of-text word, projected. MiniLM's own recipe: the mean of the last hidden states
over the words. Both are given unit length.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from models.openai_clip import describe_text, rename_text
from models.weights import WeightsError

log = logging.getLogger(__name__)

BATCH_SENTENCES = 32
CLIP_POSITIONS = 77
KEPT_POSITIONS = 20
"""Positions that LongCLIP takes from CLIP as they are; the others are stretched by four, and trained."""
STRETCH = 4


class SentenceEncoder(ABC):
    """A frozen sentence encoder.

    Attributes:
        width: Numbers in an embedding.
    """

    width: int

    def encode(self, sentences: Sequence[str]) -> Float[np.ndarray, "sentence text"]:
        """Embed sentences; float32, each row of unit length.

        Repeated sentences are computed once. Sentences are batched in an order of their own, so the result does
        not depend on the order in which they are given. What is longer than the encoder reads is cut off.
        """
        unique = sorted(set(sentences), key=lambda sentence: (len(sentence), sentence))
        rows = {sentence: index for index, sentence in enumerate(unique)}
        table = np.empty((len(unique), self.width), np.float32)
        for start in range(0, len(unique), BATCH_SENTENCES):
            batch = unique[start : start + BATCH_SENTENCES]
            table[start : start + len(batch)] = self._encode_batch(batch)
        return table[[rows[sentence] for sentence in sentences]]

    @abstractmethod
    def _encode_batch(self, sentences: list[str]) -> Float[np.ndarray, "sentence text"]: ...


def open_sentence_encoder(folder: Path, device: str = "cpu") -> SentenceEncoder:
    """The encoder in a folder: LongCLIP, where it holds that, else one in the Hugging Face layout, such as MiniLM.

    Raises:
        WeightsError: It holds neither.
    """
    if list(folder.glob("longclip*.safetensors")):
        return LongClip(folder, device)
    if (folder / "config.json").is_file():
        return MeanOfWords(folder, device)
    raise WeightsError(f"no sentence encoder at {folder}: expected longclip*.safetensors, or config.json")


class MeanOfWords(SentenceEncoder):
    """An encoder whose sentences are the mean of their words, from a local folder in the Hugging Face layout."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        # The library otherwise warns when a process that has used the tokenizer forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        transformers_logging.disable_progress_bar()  # a bar for each load would tear the stage's own
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model = self._model.eval().to(device)
        self._device = device
        self._longest = int(self._model.config.max_position_embeddings)
        self.width = int(self._model.config.hidden_size)

    @torch.inference_mode()
    def _encode_batch(self, sentences: list[str]) -> Float[np.ndarray, "sentence text"]:
        words = self._tokenizer(
            sentences, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(**words).last_hidden_state
        mask = words["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()


class LongClip(SentenceEncoder):
    """LongCLIP's text side.

    Args:
        folder: With `longclip*.safetensors`, as `weights pull` converts it, and CLIP's tokenizer.json.
        device: Where it runs.

    Raises:
        WeightsError: A file is missing or holds something else.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        path = next(iter(sorted(folder.glob("longclip*.safetensors"))), folder / "longclip-L.safetensors")
        try:
            state = rename_text(load_file(path))
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # a library in Rust raises plain exceptions
            raise WeightsError(
                f"no LongCLIP at {folder}: {error!r}; expected {path.name} and tokenizer.json"
            ) from error
        config = describe_text(state)
        if lost_positions(state["text_model.embeddings.position_embedding.weight"]):
            log.warning(
                "%s: positions from %d on are CLIP's, stretched: its trained ones are lost", path, KEPT_POSITIONS
            )
        model = CLIPTextModelWithProjection(config)
        model.load_state_dict(state)
        self._model, self._device = model.eval().to(device), device
        self._tokenizer.enable_truncation(config.max_position_embeddings)
        self.width = int(config.projection_dim)

    @torch.inference_mode()
    def _encode_batch(self, sentences: list[str]) -> Float[np.ndarray, "sentence text"]:
        rows = [torch.tensor(encoding.ids) for encoding in self._tokenizer.encode_batch(sentences)]
        words = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._device)
        found = self._model(input_ids=words).text_embeds
        return torch.nn.functional.normalize(found, dim=-1).float().cpu().numpy()


def lost_positions(positions: Float[Tensor, "position text"]) -> bool:
    """Whether the positions that LongCLIP trains are still those that it starts from: straight lines of four steps.

    A widely used converter copies the table that is not trained, and leaves out the other.
    """
    if len(positions) <= CLIP_POSITIONS:
        return False
    blocks = positions[KEPT_POSITIONS:].float()
    blocks = blocks[: len(blocks) // STRETCH * STRETCH].unflatten(0, (-1, STRETCH))
    bends = (blocks[:, 2:] - 2 * blocks[:, 1:-1] + blocks[:, :-2]).abs().amax(dim=(1, 2))
    return bool((bends < 1e-3 * blocks.abs().mean().clamp(min=1e-12)).float().mean() > 0.5)
