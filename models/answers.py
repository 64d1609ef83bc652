"""Answers of chat models, kept by the digest of what was asked, with the tokens that they cost.

One SQLite file, which all workers of a host share: a killed run asks nothing twice, and a budget holds over all.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

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


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
