"""A Prefect server for one command, where none is configured: deaf to Ctrl-C, and gone when its command is."""

import atexit
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

from stages.errors import ServerError

START_LIMIT_S = 180.0
STOP_LIMIT_S = 5.0
TEMPLATES = Path("~/.cache/moviedreamer/prefect").expanduser()
"""Folder of empty databases: making one takes a server six seconds, copying it none."""


class TemporaryServer:
    """A server in a process of its own, started before Prefect is imported, so that both come up at once.

    It has to outlive Ctrl-C, which a terminal sends to every process of a command, by a moment: it is told how the run
    ended, and only then stopped by the command. A process inherits the signals that are blocked where it is started.
    Where the command is killed, so that it stops nothing, a shell that waits for the end of its standard input stops
    the server.

    Sets `PREFECT_API_URL` for this process. What else the server needs is in the environment already.

    Args:
        home: Folder of its database, Prefect's `PREFECT_HOME`.
    """

    def __init__(self, home: Path) -> None:
        self._database, self._template = home / "prefect.db", TEMPLATES / f"{version('prefect')}.db"
        home.mkdir(parents=True, exist_ok=True)
        self._empty = not self._database.exists()
        if self._empty and self._template.exists():
            part = self._database.with_suffix(".part")
            shutil.copyfile(self._template, part)
            part.replace(self._database)
        self._port = _find_port()
        self._url = f"http://127.0.0.1:{self._port}/api"
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--log-level", "error"]
        lean = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}
        lean["PREFECT_SERVER_REGISTER_BLOCKS_ON_START"] = "false"
        script = 'cat; kill "$1" 2>/dev/null && sleep 5 && kill -9 "$1" 2>/dev/null'
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(command, env=os.environ | lean)
            watcher = ["sh", "-c", script, "sh", str(self._process.pid)]
            self._watcher = subprocess.Popen(watcher, stdin=subprocess.PIPE, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.environ["PREFECT_API_URL"] = self._url
        for name in ("NO_PROXY", "no_proxy"):  # a proxy knows nothing of this machine's servers
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
        atexit.register(self.stop)

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            ServerError: It ended, or has not answered for three minutes.
        """
        started = time.monotonic()
        while time.monotonic() - started < START_LIMIT_S:
            if (code := self._process.poll()) is not None:
                raise ServerError(f"the temporary Prefect server ended with {code} while it started: run this again")
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return self._keep_template()
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                pass
            time.sleep(0.05)
        raise ServerError(f"the temporary Prefect server did not answer at {self._url} within {START_LIMIT_S:.0f} s")

    def _keep_template(self) -> None:
        """Keep what the database is before anything has run, for the next workspace."""
        if not self._empty or self._template.exists() or not self._database.exists():
            return
        with contextlib.suppress(OSError, sqlite3.Error):  # it only saves time
            TEMPLATES.mkdir(parents=True, exist_ok=True)
            part = self._template.with_suffix(f".{os.getpid()}")
            with (
                contextlib.closing(sqlite3.connect(self._database)) as source,
                contextlib.closing(sqlite3.connect(part)) as copy,
            ):
                source.backup(copy)
            part.replace(self._template)

    def stop(self) -> None:
        """End it; what it knows is in its database."""
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._watcher.communicate()


def _find_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
