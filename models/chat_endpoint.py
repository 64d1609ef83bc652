"""Chat models behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, a vendor.

Requests go out side by side, are sent again when the endpoint is busy or away, stop when the day's budget is spent,
and are answered from the book of answers where they were asked before.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import tenacity

from models.answers import AnswerBook
from models.chat import ChatAnswer, ChatError, ChatRequest, digest_payload

BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Status codes that may pass."""
FATAL = {401: "refused the key", 403: "refused the key", 404: "knows no such model or path"}
LONGEST_WAIT_S = 60.0


class _BusyError(Exception):
    """The endpoint may answer another time.

    Attributes:
        after_s: When it asked to be tried again; None where it did not say.
    """

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


class _RefusedError(Exception):
    """This one request cannot be answered."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how.

    Attributes:
        url: Up to and including the version, such as `http://host:8000/v1`.
        model: The model's name there.
        concurrency: Requests at once.
        timeout_s: Longest wait for one answer.
        attempts: How often a request is sent before it is given up.
        daily_tokens: Most tokens a day (UTC) over all that share the book of answers, overrun at most by the requests
            under way; None for any.
        first_wait_s: Pause before the second attempt; each later one is up to twice as long.
    """

    url: str
    model: str
    concurrency: int = 16
    timeout_s: float = 120.0
    attempts: int = 6
    daily_tokens: int | None = None
    first_wait_s: float = 1.0


class EndpointModel:
    """A chat model behind an endpoint.

    Args:
        endpoint: Where.
        key: Its API key; None where it needs none. Appears in no message.
        answers: Where answers are kept.
        key_name: What the key is called in error messages.
    """

    def __init__(self, endpoint: Endpoint, key: str | None, answers: AnswerBook, key_name: str = "the API key") -> None:
        self._endpoint, self._answers, self._key_name = endpoint, answers, key_name
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._away = ""

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer]:
        """See `ChatModel`. After one request could not connect for all its attempts, the rest do not wait."""
        self._away = ""
        return asyncio.run(self._ask_all(requests))

    async def _ask_all(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer]:
        limits = httpx.Limits(max_connections=self._endpoint.concurrency)
        slots = asyncio.Semaphore(self._endpoint.concurrency)
        url = self._endpoint.url.rstrip("/") + "/"
        async with httpx.AsyncClient(
            base_url=url, headers=self._headers, timeout=self._endpoint.timeout_s, limits=limits
        ) as client:
            tasks = [asyncio.ensure_future(self._ask(client, slots, request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:  # after an error that holds for all, none of the others need go on
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: httpx.AsyncClient, slots: asyncio.Semaphore, request: ChatRequest) -> ChatAnswer:
        payload = request.payload(self._endpoint.model)
        digest = digest_payload(payload)
        async with slots:
            kept = self._answers.find(digest)
            if kept is not None:
                return ChatAnswer(request.key, kept)
            if reason := self._away or self._over_budget():
                return ChatAnswer(request.key, None, reason, retryable=True)
            try:
                text, tokens = await self._send(client, payload)
            except _RefusedError as error:
                return ChatAnswer(request.key, None, str(error))
            except (_BusyError, httpx.TransportError) as error:
                reason = f"{self._endpoint.url} did not answer after {self._endpoint.attempts} attempts: {_say(error)}"
                if isinstance(error, httpx.ConnectError):
                    self._away = reason
                return ChatAnswer(request.key, None, reason, retryable=True)
        self._answers.keep(digest, text, tokens)
        return ChatAnswer(request.key, text)

    def _over_budget(self) -> str:
        limit = self._endpoint.daily_tokens
        if limit is None or self._answers.spent_today() < limit:
            return ""
        return f"the budget of {limit} tokens a day is spent: raise daily_tokens, or run this again tomorrow"

    async def _send(self, client: httpx.AsyncClient, payload: dict[str, Any]) -> tuple[str, int]:
        again = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((_BusyError, httpx.TransportError)),
            stop=tenacity.stop_after_attempt(self._endpoint.attempts),
            wait=self._pause,
            reraise=True,
        )
        return await again(self._send_once, client, payload)

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, _BusyError) and error.after_s is not None:
            return min(error.after_s, LONGEST_WAIT_S)
        longest = min(self._endpoint.first_wait_s * 2 ** (state.attempt_number - 1), LONGEST_WAIT_S)
        return longest * random.uniform(0.5, 1.0)

    async def _send_once(self, client: httpx.AsyncClient, payload: dict[str, Any]) -> tuple[str, int]:
        answer = await client.post("chat/completions", json=payload)
        code = answer.status_code
        if code in FATAL:
            remedy = f"set {self._key_name}" if code != 404 else "check endpoint_url and model"
            raise ChatError(f"{self._endpoint.url} {FATAL[code]} ({code}, model {self._endpoint.model!r}): {remedy}")
        if code in BUSY:
            raise _BusyError(f"status {code}", _read_seconds(answer.headers.get("Retry-After")))
        if code != 200:
            raise _RefusedError(f"{self._endpoint.url} refused the request ({code}): {_shorten(answer.text)}")
        return _read_completion(answer, int(payload["max_tokens"]))


def _read_completion(answer: httpx.Response, max_tokens: int) -> tuple[str, int]:
    """The text, and the tokens that question and answer cost."""
    try:
        body = answer.json()
        choice = body["choices"][0]
        text = choice["message"]["content"]
        tokens = int((body.get("usage") or {}).get("total_tokens") or 0)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _BusyError(f"an answer that is no chat completion ({error!r}): {_shorten(answer.text)}") from None
    if choice.get("finish_reason") == "length":
        raise _RefusedError(f"the answer was cut off after {max_tokens} tokens: raise max_tokens")
    if not isinstance(text, str) or not text.strip():
        raise _BusyError("an empty answer")
    return text, tokens


def _read_seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date, which nobody sends
        return None


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, httpx.TransportError) else str(error)


def _shorten(text: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    text = " ".join(str(text).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
