"""Holds a language model to a JSON schema while it writes: what would not fit cannot be chosen.

Source: llguidance, https://github.com/guidance-ai/llguidance, which tells at each step which tokens may come next.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast

WORD_BITS = 32
_BITS = torch.ones(WORD_BITS, dtype=torch.int32) << torch.arange(WORD_BITS, dtype=torch.int32)
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes: a weak model that may choose white space fills its answer with it."""


class SchemaError(ValueError):
    """A schema that answers cannot be held to."""


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, tokens: int, ends: Sequence[int]) -> LLTokenizer:
    """What a `SchemaConstraint` needs to know of a model's tokens; takes a second, so keep it.

    Args:
        tokenizer: The model's.
        tokens: Width of its logits, which may be more than the tokenizer has.
        ends: Tokens that end an answer.
    """
    return from_tokenizer(tokenizer, n_vocab=tokens, eos_token=list(ends))


class SchemaConstraint(LogitsProcessor):
    """Masks logits in `generate`, for a batch of prompts of one (padded) length.

    Args:
        vocabulary: Of the model.
        schemas: JSON schema of each answer; None for free text.
        prompt_tokens: Length of the prompts.

    Raises:
        SchemaError: A schema uses what is not supported.
    """

    def __init__(
        self, vocabulary: LLTokenizer, schemas: Sequence[Mapping[str, Any] | None], prompt_tokens: int
    ) -> None:
        self._matchers = [_make_matcher(vocabulary, schema) if schema is not None else None for schema in schemas]
        self._read, self._ends = prompt_tokens, vocabulary.eos_tokens
        words = -(-vocabulary.vocab_size // WORD_BITS)
        self._masks = torch.full((len(schemas), words), -1, dtype=torch.int32)

    def __call__(
        self, input_ids: Int[Tensor, "prompt token"], scores: Float[Tensor, "prompt vocabulary"]
    ) -> Float[Tensor, "prompt vocabulary"]:
        """Scores with minus infinity where a token may not come next."""
        written = input_ids[:, self._read :].tolist()
        self._read = input_ids.shape[1]
        for matcher, mask, tokens in zip(self._matchers, self._masks, written, strict=True):
            if matcher is None:
                continue
            if not matcher.is_stopped():
                matcher.consume_tokens(tokens)
            if matcher.is_stopped():  # nothing may follow but the end
                mask.zero_()
                for end in self._ends:
                    mask[end // WORD_BITS] |= _BITS[end % WORD_BITS]
            else:
                matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.numel() * mask.element_size())
        allowed = self._masks.to(scores.device).unsqueeze(-1) & _BITS.to(scores.device)
        return scores.masked_fill(allowed.flatten(1)[:, : scores.shape[1]] == 0, float("-inf"))


def _make_matcher(vocabulary: LLTokenizer, schema: Mapping[str, Any]) -> LLMatcher:
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema(json.dumps({**schema, "x-guidance": STYLE})))
    if matcher.is_error():
        raise SchemaError(f"answers cannot be held to the schema: {matcher.get_error()}")
    return matcher
