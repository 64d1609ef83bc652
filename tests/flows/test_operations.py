"""Deployments on real Prefect servers, SQLite and Postgres: scheduled runs fire, and films that appear come in."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from flows.workspace import Workspace
from models import weights
from tests.servers import BIN, heed_interrupts, run_prefect

ROOT = Path(__file__).parents[2]
FILM = weights.folder("demo_films") / "carphone_pristine.mp4"
SETTINGS = ["keyframes.every_n_frames=60", "engine.executor=inline"]
STAGES = {"keyframes", "people", "faces", "identities", "captions", "scripts", "shards"}


class Deployed:
    """A Prefect server on which `prefect deploy --all` was called, as an operator does."""

    def __init__(self, url, home):
        self.url = url
        self.variables = os.environ | {"PREFECT_API_URL": url, "PREFECT_HOME": str(home)}
        self.run("work-pool", "create", "moviedreamer", "--type", "process")
        self.run("deploy", "--all")

    def run(self, *words):
        command = [str(BIN / "prefect"), "--no-prompt", *words]
        done = subprocess.run(command, cwd=ROOT, env=self.variables, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def ask(self, what, **query):
        return httpx.post(f"{self.url}/{what}/filter", json={"limit": 200} | query, timeout=30).json()

    def deployment(self, name):
        return next(d for d in self.ask("deployments") if d["name"] == name)

    def schedule(self, name, **parameters):
        """Let a deployment's next run start by schedule in a moment, and no other before the test is over."""
        found = self.deployment(name)
        # The server looks every 5 s for deployments that changed, and plans what is to come, not what is past.
        anchor = (datetime.now(UTC) + timedelta(seconds=10)).isoformat()
        every = {"interval": 86400, "anchor_date": anchor, "timezone": "UTC"}
        for old in found["schedules"]:
            httpx.delete(f"{self.url}/deployments/{found['id']}/schedules/{old['id']}", timeout=30).raise_for_status()
        changed = {"parameters": found["parameters"] | parameters}
        httpx.patch(f"{self.url}/deployments/{found['id']}", json=changed, timeout=30).raise_for_status()
        made = [{"active": True, "schedule": every}]
        httpx.post(f"{self.url}/deployments/{found['id']}/schedules", json=made, timeout=30).raise_for_status()

    @contextmanager
    def worker(self, log):
        command = [str(BIN / "prefect"), "worker", "start", "--pool", "moviedreamer", "--type", "process"]
        variables = self.variables | {"PREFECT_WORKER_QUERY_SECONDS": "1"}
        with log.open("wb") as stream:
            streams = {"stdout": stream, "stderr": stream, "preexec_fn": heed_interrupts}
            process = subprocess.Popen(command, cwd=ROOT, env=variables, **streams)
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)

    def wait_for_run(self, name, log):
        """The first run of a deployment that has ended."""
        wanted = self.deployment(name)["id"]
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline:
            for run in self.ask("flow_runs"):
                if run["deployment_id"] == wanted and run["state_type"] in ("COMPLETED", "FAILED", "CRASHED"):
                    assert run["state_type"] == "COMPLETED", log.read_text()[-4000:]
                    return run
            time.sleep(0.5)
        pytest.fail(f"no run of {name} ended: {log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory):
    home = tmp_path_factory.mktemp("prefect")
    with run_prefect(home) as url:
        yield Deployed(url, home)


@pytest.fixture(scope="module")
def on_postgres(tmp_path_factory, postgres):
    home = tmp_path_factory.mktemp("prefect")
    with run_prefect(home, f"postgresql+asyncpg:{postgres.new_database()}") as url:
        yield Deployed(url, home)


def kinds(workspace):
    opened = Workspace.open(workspace)
    found = {artifact.kind for artifact in opened.catalog.artifacts()}
    opened.catalog.close()
    return found


def test_a_scheduled_ingestion_completes_and_its_page_shows_what_it_did(on_sqlite, tmp_path):
    log, workspace, broken = tmp_path / "log", tmp_path / "w", tmp_path / "broken.mp4"
    broken.write_bytes(b"not a film")
    on_sqlite.schedule("ingest", films=[str(FILM), str(broken)], workspace=str(workspace), settings=SETTINGS)
    with on_sqlite.worker(log):
        run = on_sqlite.wait_for_run("ingest", log)
    assert run["auto_scheduled"]
    assert run["state"]["name"] == "CompletedWithFailures"
    assert "1 failed, such as broken.mp4 at keyframes" in run["state"]["message"]
    assert kinds(workspace) == STAGES
    pages = {artifact["key"]: artifact for artifact in on_sqlite.ask("artifacts")}
    assert FILM.name in pages["people-subjects"]["data"]
    assert pages["keyframes-progress"]["data"] == 100.0
    assert pages["keyframes-pictures"]["data"].startswith("data:image/jpeg")
    assert "objects" in pages["scripts-artifacts"]["data"]
    deadline = time.monotonic() + 30  # the server records task runs in the background
    while time.monotonic() < deadline:
        done = [task for task in on_sqlite.ask("task_runs") if task["state_type"] == "COMPLETED"]
        if len(names := {task["name"].split("-")[0] for task in done}) == len(STAGES):
            break
        time.sleep(0.5)
    assert names == STAGES


def test_films_that_appear_are_ingested(on_postgres, tmp_path):
    log, workspace, place = tmp_path / "log", tmp_path / "w", tmp_path / "incoming - films"
    place.mkdir()
    shutil.copyfile(FILM, place / "a new film.mp4")
    settings = {"settle_s": 0, "settings": SETTINGS, "workspace": str(workspace)}
    on_postgres.schedule("watch", place=str(place), **settings)
    with on_postgres.worker(log):
        assert on_postgres.wait_for_run("watch", log)["auto_scheduled"]
        run = on_postgres.wait_for_run("ingest", log)
    assert run["parameters"]["films"] == [str(place)]
    assert run["parameters"]["settings"] == SETTINGS
    assert kinds(workspace) == STAGES
    opened = Workspace.open(workspace)
    assert [row["film_id"] for row in opened.catalog.films()] == ["a new film.mp4"]
    opened.catalog.close()


def test_the_server_refuses_wrong_parameters_and_describes_them(on_sqlite):
    found = on_sqlite.deployment("backfill")
    assert all(about["description"] for about in found["parameter_openapi_schema"]["properties"].values())
    for name, value in (("batch_films", 0), ("reprocess", "everything"), ("settings", ["nonsense"])):
        body = {"parameters": {name: value}}
        answer = httpx.post(f"{on_sqlite.url}/deployments/{found['id']}/create_flow_run", json=body, timeout=30)
        assert answer.status_code in (409, 422), (name, answer.text)
        assert name in answer.text


def test_stages_on_accelerators_wait_for_a_slot(on_sqlite, tmp_path):
    """A limit of one slot that is taken holds a training stage back, whichever flow it belongs to."""
    script = tmp_path / "hold.py"
    script.write_text(
        "import json, sys, time\n"
        "from prefect import flow\n"
        "from flows.tasks import gpu_slot\n"
        "from stages import people, train_autoencoder\n"
        "@flow\n"
        "def hold(seconds: float):\n"
        "    times = {}\n"
        "    for spec in (people.SPEC, train_autoencoder.SPEC):\n"
        "        with gpu_slot(spec.gpus):\n"
        "            times[spec.name] = [time.time()]\n"
        "            time.sleep(seconds)\n"
        "        times[spec.name].append(time.time())\n"
        "    return times\n"
        "print(json.dumps(hold(float(sys.argv[1]))))\n"
    )
    on_sqlite.run("gcl", "create", "gpu", "--limit", "1")
    command = [sys.executable, str(script), "4"]
    variables = on_sqlite.variables | {"PYTHONPATH": str(ROOT)}
    options = {"env": variables, "cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    first, second = (json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both)
    begun, ended = zip(*sorted([first["train_autoencoder"], second["train_autoencoder"]]), strict=True)
    assert begun[1] >= ended[0], "two accelerator stages ran at once"
