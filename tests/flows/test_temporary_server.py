"""The server that a command starts for itself where none is configured."""

import os
import signal

import httpx
import pytest

from flows import temporary_server
from flows.temporary_server import TemporaryServer
from stages.errors import ServerError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where its database goes, with an environment that the test may spoil."""
    monkeypatch.setattr(temporary_server, "TEMPLATES", tmp_path / "templates")
    folder = tmp_path / "a home"
    monkeypatch.setenv("PREFECT_API_URL", "before")
    monkeypatch.setenv("PREFECT_HOME", str(folder))
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    return folder


def test_a_server_answers_until_it_is_stopped_and_its_empty_database_is_kept_for_the_next(home, tmp_path):
    server = TemporaryServer(home)
    server.wait()
    url = os.environ["PREFECT_API_URL"]
    assert httpx.get(f"{url}/health").json() is True
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    (template,) = (tmp_path / "templates").glob("*.db")
    other = TemporaryServer(tmp_path / "other")
    assert (tmp_path / "other" / "prefect.db").read_bytes() == template.read_bytes()
    other.stop()


def test_a_server_that_dies_while_it_starts_is_noticed_at_once(home):
    server = TemporaryServer(home)
    os.kill(server._process.pid, signal.SIGKILL)
    with pytest.raises(ServerError, match="ended with -9 while it started: run this again"):
        server.wait()
    server.stop()
