"""Prefect's temporary server, for commands where none is configured: deaf to Ctrl-C, and gone when its command is."""

import signal
import subprocess
from typing import Any

from prefect.server.api.server import SubprocessASGIServer


class TemporaryServer(SubprocessASGIServer):
    """Takes the place of Prefect's own: there is one instance a process, which Prefect finds when a flow starts.

    The server has to outlive Ctrl-C, which a terminal sends to every process of a command, by a moment: it is told how
    the run ended, and only then stopped by the command. A process inherits the signals that are blocked where it is
    started. Where the command is killed, so that it stops nothing, a shell that waits for the end of its standard input
    stops the server.
    """

    _watchers: list[subprocess.Popen[bytes]] = []  # kept: the end of their standard input is what they wait for

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            server = super()._run_uvicorn_command()
            script = 'cat; kill "$1" 2>/dev/null && sleep 5 && kill -9 "$1" 2>/dev/null'
            command = ["sh", "-c", script, "sh", str(server.pid)]
            self._watchers.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return server
