"""Chat models that run here, from a local folder: DeepSeek-VL as in the paper, Qwen-VL, or a model without eyes.

Prompts are put together here from tokenizer and image processor: the ready-made processors ask for torchvision, to read
videos.

Source: the paper, section 4.2 and appendix B (DeepSeek-VL captions, a language model writes the scripts).
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LogitsProcessorList,
)

from models.chat import ChatAnswer, ChatError, ChatRequest
from models.pretrained import choose_device
from models.schema_constraint import SchemaConstraint, read_vocabulary

IMAGE_PROCESSORS = {
    "deepseek_vl": "DeepseekVLImageProcessorPil",
    "deepseek_vl_hybrid": "DeepseekVLHybridImageProcessorPil",
    "qwen2_5_vl": "Qwen2VLImageProcessorPil",
    "qwen3_vl": "Qwen2VLImageProcessorPil",
}
"""Model type to the image processor that needs no torchvision."""
DEEPSEEK_PICTURE_TOKENS = 576
"""Of one picture, where processor_config.json does not say."""


class LocalChatModel:
    """A chat model from a folder in the Hugging Face layout, on an accelerator where there is one.

    Args:
        folder: With config.json, safetensors and tokenizer.
        device: Where it runs; None takes an accelerator where there is one.

    Raises:
        ChatError: The folder holds no such model.
    """

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self._device = choose_device(device)
        if not (folder / "config.json").is_file():
            raise ChatError(f"no chat model at {folder}: expected a folder with config.json, or set endpoint_url")
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._eyes = _Eyes(folder, kind, self._tokenizer) if kind in IMAGE_PROCESSORS else None
        family: Any = AutoModelForImageTextToText if self._eyes else AutoModelForCausalLM
        dtype = torch.bfloat16 if self._device.startswith("cuda") else torch.float32
        try:
            model = family.from_pretrained(folder, local_files_only=True, dtype=dtype, use_safetensors=True)
        except ValueError as error:
            known = ", ".join(IMAGE_PROCESSORS)
            raise ChatError(f"{folder} holds a {kind!r} model: expected one of {known}, or a language model") from error
        self._model = model.eval().to(self._device)
        self._ends = _as_list(model.generation_config.eos_token_id) or [self._tokenizer.eos_token_id]
        self._vocabulary = read_vocabulary(self._tokenizer, model.get_input_embeddings().num_embeddings, self._ends)

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer]:
        """See `ChatModel`. All requests are one batch, halved where something of it fails.

        What an answer has to look like is said in words, and held to word by word.
        """
        if not requests:
            return []
        try:
            return self._answer(requests)
        except (OSError, ValueError, torch.OutOfMemoryError) as error:  # a broken picture, a prompt that does not fit
            if len(requests) == 1:
                return [_refuse(requests[0], error)]
            half = len(requests) // 2
            return self.ask(requests[:half]) + self.ask(requests[half:])

    def forget(self, requests: Sequence[ChatRequest]) -> None:
        """See `ChatModel`: nothing is kept here."""

    @torch.inference_mode()
    def _answer(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer]:
        texts = [self._write_prompt(request) for request in requests]
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for request in requests for data in request.pictures]
        if pictures and self._eyes is None:
            raise ValueError("the model sees no pictures: choose a vision-language model")
        seen: dict[str, Any] = {}
        if pictures and self._eyes:
            texts, seen = self._eyes.look(texts, pictures)
        words = self._tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs = {"input_ids": words["input_ids"], "attention_mask": words["attention_mask"]} | seen
        if "image_grid_thw" in seen and self._eyes:  # Qwen tells positions in pictures by which tokens stand for them
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._eyes.token_id).int()
        dtype = self._model.dtype
        inputs = {
            name: value.to(self._device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }
        length, limit = inputs["input_ids"].shape[1], max(request.max_tokens for request in requests)
        temperature = requests[0].temperature
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        held = SchemaConstraint(self._vocabulary, [request.schema for request in requests], length)
        written = self._model.generate(
            **inputs,
            max_new_tokens=limit,
            pad_token_id=self._tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([held]),
            **sampling,
        )[:, length:]
        return [self._read(request, tokens) for request, tokens in zip(requests, written, strict=True)]

    def _write_prompt(self, request: ChatRequest) -> str:
        text = request.text
        if request.schema is not None:
            text += f"\n\nThe JSON schema of the answer: {json.dumps(request.schema)}"
        parts = [{"type": "image"} for _ in request.pictures] + [{"type": "text", "text": text}]
        content: Any = parts if self._eyes else text
        messages = [{"role": "user", "content": content}]
        if request.system:
            system: Any = [{"type": "text", "text": request.system}] if self._eyes else request.system
            messages.insert(0, {"role": "system", "content": system})
        prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        start = self._tokenizer.bos_token or ""
        return prompt if prompt.startswith(start) else start + prompt

    def _read(self, request: ChatRequest, tokens: torch.Tensor) -> ChatAnswer:
        kept: list[int] = []
        for token in tokens.tolist():
            if token in self._ends:
                break
            kept.append(token)
        if len(kept) >= request.max_tokens:
            error = f"the answer was cut off after {request.max_tokens} tokens: raise max_tokens"
            return ChatAnswer(request.key, None, error)
        return ChatAnswer(request.key, self._tokenizer.decode(kept, skip_special_tokens=True))


def _refuse(request: ChatRequest, error: Exception) -> ChatAnswer:
    return ChatAnswer(request.key, None, f"the model cannot be asked this: {error}")


def _as_list(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


class _Eyes:
    """Turns pictures into what a model reads, and makes room for them in its prompts."""

    def __init__(self, folder: Path, kind: str, tokenizer: Any) -> None:
        self._processor = getattr(transformers, IMAGE_PROCESSORS[kind]).from_pretrained(folder, local_files_only=True)
        self.token_id = AutoConfig.from_pretrained(folder, local_files_only=True).image_token_id
        self._token = tokenizer.convert_ids_to_tokens(self.token_id)
        path = folder / "processor_config.json"
        facts = json.loads(path.read_text()) if path.is_file() else {}
        self._fixed_tokens = facts.get("num_image_tokens", DEEPSEEK_PICTURE_TOKENS)

    def look(self, texts: Sequence[str], pictures: Sequence[Image.Image]) -> tuple[list[str], dict[str, Any]]:
        """The prompts with as many picture tokens as each picture takes, and the model's further inputs."""
        seen = dict(self._processor(images=list(pictures), return_tensors="pt"))
        if "image_grid_thw" in seen:
            counts = (seen["image_grid_thw"].prod(1) // self._processor.merge_size**2).tolist()
        else:
            counts = [self._fixed_tokens] * len(pictures)
        left = iter(counts)
        filled = []
        for text in texts:
            first, *rest = text.split(self._token)
            filled.append(first + "".join(self._token * next(left, 0) + part for part in rest))
        if sum(text.count(self._token) for text in filled) != sum(counts):
            raise ValueError("the prompt has not as much room for pictures as there are")
        return filled, seen
