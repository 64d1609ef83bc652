"""Answers of chat models, kept by the digest of what was asked, with the tokens that they cost.

One SQLite file, which all workers of a host share: a killed run asks nothing twice, and a budget holds over all.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from models.chat import ChatAnswer, ChatModel, ChatRequest, digest_payload

DEFAULT_FILE = Path("~/.cache/moviedreamer/answers.sqlite").expanduser()
_TABLES = (
    "CREATE TABLE IF NOT EXISTS answer (digest TEXT PRIMARY KEY, text TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS spent (day TEXT PRIMARY KEY, tokens INTEGER NOT NULL)",
)
PATIENCE_S = 60.0


class AnswerBook:
    """The kept answers, and what was spent on all, kept or not.

    Args:
        path: The file; made where it is absent.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or DEFAULT_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            for table in _TABLES:
                connection.execute(table)

    def find(self, digest: str) -> str | None:
        """The answer to a request, or None."""
        with self._open() as connection:
            row = connection.execute("SELECT text FROM answer WHERE digest = ?", (digest,)).fetchone()
        return row[0] if row else None

    def keep(self, digest: str, text: str) -> None:
        """Keep an answer. A later one to the same request takes its place."""
        with self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO answer VALUES (?, ?)", (digest, text))

    def forget(self, digests: Iterable[str]) -> None:
        """Drop answers that turned out to be of no use, so that they are asked for anew."""
        with self._open() as connection:
            connection.executemany("DELETE FROM answer WHERE digest = ?", [(digest,) for digest in digests])

    def spend(self, tokens: int) -> None:
        """Note what an answer cost, today (UTC)."""
        with self._open() as connection:
            connection.execute(
                "INSERT INTO spent VALUES (?, ?) ON CONFLICT (day) DO UPDATE SET tokens = tokens + excluded.tokens",
                (_today(), tokens),
            )

    def spent_today(self) -> int:
        """Tokens spent on this day (UTC)."""
        with self._open() as connection:
            row = connection.execute("SELECT tokens FROM spent WHERE day = ?", (_today(),)).fetchone()
        return int(row[0]) if row else 0

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=PATIENCE_S)
        try:
            with connection:
                yield connection
        finally:
            connection.close()


class RememberingModel:
    """A chat model whose answers are kept as they come, so that a killed run asks only what is missing.

    Args:
        model: Answers what was not asked before.
        name: Of the model, as part of what was asked: tells its weights apart from all others.
        answers: Where answers are kept.
        batch: Requests that go to the model at once.
    """

    def __init__(self, model: ChatModel, name: str, answers: AnswerBook, batch: int) -> None:
        self._model, self._name, self._answers, self._batch = model, name, answers, batch

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer]:
        """See `ChatModel`."""
        digests = [self._digest(request) for request in requests]
        found = [self._answers.find(digest) for digest in digests]
        answers = [ChatAnswer(request.key, text) for request, text in zip(requests, found, strict=True)]
        missing = [index for index, text in enumerate(found) if text is None]
        for start in range(0, len(missing), self._batch):
            batch = missing[start : start + self._batch]
            for index, answer in zip(batch, self._model.ask([requests[index] for index in batch]), strict=True):
                answers[index] = answer
                if answer.text is not None:
                    self._answers.keep(digests[index], answer.text)
        return answers

    def forget(self, requests: Sequence[ChatRequest]) -> None:
        """See `ChatModel`."""
        self._answers.forget(map(self._digest, requests))

    def _digest(self, request: ChatRequest) -> str:
        return digest_payload(request.payload(self._name))


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
