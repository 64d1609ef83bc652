"""Sentence embeddings: one vector for one description.

Dimensions: sentence = sentences asked for, text = width of an embedding.

Source: the paper, section 3.3 (each description becomes one token of a text encoder). MiniLM's own recipe: mean of
the last hidden states over the words, then unit length.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

BATCH_SENTENCES = 32


class SentenceEncoder:
    """A frozen sentence encoder from a local folder in the Hugging Face layout.

    Attributes:
        width: Numbers in an embedding (384 for MiniLM-L6).
    """

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

    @torch.inference_mode()
    def _encode_batch(self, sentences: list[str]) -> Float[np.ndarray, "sentence text"]:
        words = self._tokenizer(
            sentences, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(**words).last_hidden_state
        mask = words["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
