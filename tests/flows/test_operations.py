"""A flow against a real Prefect server that the test starts: what its run page shows."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import httpx
import pytest

from models import weights

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prefect server on a free port of this machine, with its own database."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    variables = os.environ | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    }
    command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}/api"
        try:
            _wait_until_healthy(f"{url}/health", process)
            yield url, home
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_healthy(url, process):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the Prefect server did not start")


def test_run_page_shows_what_the_stages_did(server, tmp_path):
    url, home = server
    film = weights.folder("demo_films") / "carphone_pristine.mp4"
    variables = os.environ | {"PREFECT_API_URL": url, "PREFECT_HOME": str(home)}
    settings = ("--set", "keyframes.every_n_frames=30", "--set", "engine.executor=inline")
    command = [sys.executable, "-m", "flows.cli", "ingest", str(film), "--workspace", str(tmp_path / "w"), *settings]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    def ask(what):
        return httpx.post(f"{url}/{what}/filter", json={"limit": 200}, timeout=30).json()

    (flow_run,) = ask("flow_runs")
    assert (flow_run["state_type"], flow_run["parameters"]["films"]) == ("COMPLETED", [str(film)])
    pages = {artifact["key"]: artifact for artifact in ask("artifacts")}
    assert "carphone_pristine.mp4" in pages["people-subjects"]["data"]
    assert pages["keyframes-progress"]["data"] == 100.0
    assert pages["keyframes-pictures"]["data"].startswith("data:image/jpeg")
    assert "objects" in pages["scripts-artifacts"]["data"]
    deadline = time.monotonic() + 30  # the server records task runs in the background
    while time.monotonic() < deadline:
        names = {task["name"].split("-")[0] for task in ask("task_runs") if task["state_type"] == "COMPLETED"}
        if len(names) == 7:
            break
        time.sleep(0.5)
    assert names == {"keyframes", "people", "faces", "identities", "captions", "scripts", "shards"}
