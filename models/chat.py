"""Chat models that see pictures: what they are asked and what they answer, whichever of them it is.

Source: the messages follow OpenAI's chat completions, which vLLM, SGLang, llama.cpp and most vendors serve.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class ChatError(Exception):
    """No request can be answered: the key is refused, the model is unknown, the folder holds none."""


@dataclass(frozen=True)
class ChatRequest:
    """One question.

    Attributes:
        key: What it is about; comes back with the answer.
        text: The question.
        system: What holds for all questions of a kind.
        pictures: JPEG or PNG files, in the order in which the text speaks of them.
        schema: JSON schema that the answer has to follow; None for free text.
        max_tokens: Longest answer.
        temperature: 0 for the most likely answer.
    """

    key: str
    text: str
    system: str = ""
    pictures: tuple[bytes, ...] = ()
    schema: Mapping[str, Any] | None = field(default=None, hash=False)
    max_tokens: int = 1024
    temperature: float = 0.0

    def payload(self, model: str) -> dict[str, Any]:
        """The body of a chat completions request."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in self.pictures
        ]
        content.append({"type": "text", "text": self.text})
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": content if self.pictures else self.text})
        body: dict[str, Any] = {"model": model, "messages": messages}
        body |= {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": 0}
        if self.schema is not None:
            named = {"name": "answer", "strict": True, "schema": self.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body


@dataclass(frozen=True)
class ChatAnswer:
    """What came back.

    Attributes:
        key: The request's.
        text: The answer; None where there is none.
        error: Why there is none, with the remedy.
        retryable: Whether asking again later may help.
    """

    key: str
    text: str | None
    error: str = ""
    retryable: bool = False


class ChatModel(Protocol):
    """Anything that answers."""

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer]:
        """One answer for each request, in their order.

        Raises:
            ChatError: None of them can be answered.
        """
        ...

    def forget(self, requests: Sequence[ChatRequest]) -> None:
        """Keep no answers to these: they were of no use, and another time the model is to be asked anew."""
        ...


def digest_payload(payload: Mapping[str, Any]) -> str:
    """SHA-256 of a request's body: equal requests get the answer that the first one got."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _data_url(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
