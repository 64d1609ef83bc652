"""Answers of chat models, kept by the digest of what was asked, with the tokens that they cost.

One SQLite file, which all workers of a host share: a killed run asks nothing twice, and a budget holds over all.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

DEFAULT_FILE = Path("~/.cache/moviedreamer/answers.sqlite").expanduser()
_TABLE = """
CREATE TABLE IF NOT EXISTS answer (
    digest TEXT PRIMARY KEY, text TEXT NOT NULL, tokens INTEGER NOT NULL, day TEXT NOT NULL
)
"""
PATIENCE_S = 60.0


class AnswerBook:
    """The kept answers.

    Args:
        path: The file; made where it is absent.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or DEFAULT_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(_TABLE)
            connection.execute("CREATE INDEX IF NOT EXISTS answer_day ON answer (day, tokens)")

    def find(self, digest: str) -> str | None:
        """The answer to a request, or None."""
        with self._open() as connection:
            row = connection.execute("SELECT text FROM answer WHERE digest = ?", (digest,)).fetchone()
        return row[0] if row else None

    def keep(self, digest: str, text: str, tokens: int) -> None:
        """Keep an answer, and what it cost today. A later one to the same request takes its place."""
        with self._open() as connection:
            values = (digest, text, tokens, _today())
            connection.execute("INSERT OR REPLACE INTO answer VALUES (?, ?, ?, ?)", values)

    def spent_today(self) -> int:
        """Tokens that the answers of this day (UTC) cost."""
        with self._open() as connection:
            row = connection.execute(
                "SELECT COALESCE(SUM(tokens), 0) FROM answer WHERE day = ?", (_today(),)
            ).fetchone()
        return int(row[0])

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
