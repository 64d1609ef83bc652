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
from urllib.parse import urlsplit, urlunsplit

import httpx
import tenacity

from models.answers import AnswerBook
from models.chat import ChatAnswer, ChatError, ChatRequest, digest_payload

BUSY = {408, 409, 425, 429}
"""Status codes that may pass, beside all from 500 on."""
LONGEST_WAIT_S = 60.0
AWAY_AFTER = 3
"""So many requests in a row that were given up: the endpoint is away, and the others do not wait for it."""
LETTERS_A_TOKEN = 4
"""Where an endpoint does not say what an answer cost."""


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
        self._place = _without_password(endpoint.url)
        key = key.strip() if key else None  # a mounted secret often ends in a new line
        if key and not (key.isascii() and key.isprintable()):
            raise ChatError(f"the key for {self._place} has letters that no key has: set {key_name} anew")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._away, self._given_up = "", 0

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer]:
        """See `ChatModel`. Once the endpoint is found to be away, the rest do not wait for it."""
        self._away, self._given_up = "", 0
        return asyncio.run(self._ask_all(requests))

    def forget(self, requests: Sequence[ChatRequest]) -> None:
        """See `ChatModel`."""
        self._answers.forget(digest_payload(request.payload(self._endpoint.model)) for request in requests)

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
                text = await self._send(client, payload)
            except _RefusedError as error:
                return ChatAnswer(request.key, None, str(error))
            except (_BusyError, httpx.TransportError) as error:
                return ChatAnswer(request.key, None, self._give_up(error), retryable=True)
        self._given_up = 0
        self._answers.keep(digest, text)
        return ChatAnswer(request.key, text)

    def _give_up(self, error: Exception) -> str:
        reason = f"{self._place} did not answer after {self._endpoint.attempts} attempts: {_say(error)}"
        self._given_up += 1
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) or self._given_up >= AWAY_AFTER:
            self._away = reason
        return reason

    def _over_budget(self) -> str:
        limit = self._endpoint.daily_tokens
        if limit is None or self._answers.spent_today() < limit:
            return ""
        return f"the budget of {limit} tokens a day is spent: raise daily_tokens, or run this again tomorrow"

    async def _send(self, client: httpx.AsyncClient, payload: dict[str, Any]) -> str:
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

    async def _send_once(self, client: httpx.AsyncClient, payload: dict[str, Any]) -> str:
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                answer = await client.post("chat/completions", json=payload)
        except TimeoutError:
            raise _BusyError(f"no whole answer within {self._endpoint.timeout_s:g} s") from None
        code, told = answer.status_code, _shorten(answer.text)
        if code in (401, 403) or (code == 400 and "api key" in told.lower()):
            raise ChatError(f"{self._place} refused the key ({code}): set {self._key_name}")
        if code in (402, 404, 405) or 300 <= code < 400:
            about = {402: "credit", 404: "endpoint_url and model"}.get(code, "endpoint_url")
            raise ChatError(f"{self._place} answers nothing ({code}, model {self._endpoint.model!r}): check {about}")
        if code in BUSY or code >= 500:
            raise _BusyError(f"status {code}", _read_seconds(answer.headers.get("Retry-After")))
        if code != 200:
            raise _RefusedError(f"{self._place} refused the request ({code}): {told}")
        return self._read_completion(answer, payload)

    def _read_completion(self, answer: httpx.Response, payload: dict[str, Any]) -> str:
        """The text; what it cost is noted, whether or not it is of use."""
        try:
            body = answer.json()
            choice = body["choices"][0]
            text = choice["message"]["content"]
            tokens = int((body.get("usage") or {}).get("total_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            told = _shorten(answer.text)
            raise _BusyError(f"an answer that is no chat completion ({error!r}): {told}") from None
        letters = len(answer.text) + len(json.dumps(payload["messages"]))
        self._answers.spend(tokens or letters // LETTERS_A_TOKEN)
        if choice.get("finish_reason") == "length":
            raise _RefusedError(f"the answer was cut off after {payload['max_tokens']} tokens: raise max_tokens")
        if not isinstance(text, str) or not text.strip():
            raise _BusyError("an empty answer")
        return text


def _without_password(url: str) -> str:
    """The URL as it may be shown."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _read_seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date, which nobody sends
        return None


def _say(error: Exception) -> str:
    """An error for a person. A protocol error's own words may hold the headers, and with them the key."""
    if isinstance(error, httpx.LocalProtocolError):
        return type(error).__name__
    return f"{type(error).__name__}: {error}" if isinstance(error, httpx.TransportError) else str(error)


def _shorten(text: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    text = " ".join(str(text).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
