"""What is told of a run while it goes on: the catalog's heartbeat, the status, the metrics."""

import time
import urllib.request
from collections import Counter
from datetime import timedelta

from flows.heartbeat import Heartbeat
from flows.metrics import Metrics
from flows.status import read_status
from stages.engine import StageReport
from tests.flows.ingested import PROFILE, fail, ingest, note_film
from tests.servers import free_port


def test_status_tells_of_runs_failures_cost_and_what_is_left(workspace):
    ingest(workspace, "a", "b")
    note_film(workspace, "new")
    fail(workspace, "bad", "/x/bad.mp4: no video stream")
    done = workspace.catalog.start_run("ingest")
    failures = [{"subject": "bad", "stage": "keyframes", "error": "no video stream"}]
    workspace.catalog.end_run(done, "done", {"computed": {"people": 2}, "failed": failures})
    running = workspace.catalog.start_run("backfill")
    workspace.catalog.beat(running, {"stage": "faces", "done": 3, "total": 12, "message": ""})
    state = read_status(workspace, PROFILE)
    assert [(run["id"], run["progress"]["stage"]) for run in state["running"]] == [(running, "faces")]
    assert [(run["state"], run["computed"], run["failed"]) for run in state["recent"]] == [("done", {"people": 2}, 1)]
    assert state["failed"] == [{"stage": "keyframes", "cause": "no video stream", "count": 1}]
    assert state["cost"]["people"] == {"count": 2, "seconds": 4.0, "bytes": 2000}
    assert state["left"]["keyframes"] == 1
    assert state["films"] == 4


def test_a_run_that_fell_silent_counts_as_killed(workspace, monkeypatch):
    run_id = workspace.catalog.start_run("ingest")
    assert [row["id"] for row in workspace.catalog.active_runs()] == [run_id]
    monkeypatch.setattr("storage.catalog.DEAD_AFTER", -timedelta(seconds=1))
    assert workspace.catalog.active_runs() == []
    assert workspace.catalog.runs()[0]["state"] == "killed"


def test_a_heartbeat_beats_until_it_is_closed(workspace, monkeypatch):
    monkeypatch.setattr("flows.heartbeat.PERIOD_S", 0.05)
    run_id = workspace.catalog.start_run("ingest")
    heart = Heartbeat(workspace.catalog, run_id)
    heart.progress = {"stage": "people", "done": 1, "total": 2, "message": ""}
    deadline = time.monotonic() + 10
    while workspace.catalog.runs()[0]["progress"] is None and time.monotonic() < deadline:
        time.sleep(0.05)
    heart.close()
    row = workspace.catalog.runs()[0]
    assert row["progress"]["stage"] == "people"
    time.sleep(0.2)
    assert workspace.catalog.runs()[0]["beat_at"] == row["beat_at"]


def test_prometheus_reads_what_happens(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, 75, 1024, 81920'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    address = f"127.0.0.1:{free_port()}"
    metrics, second = Metrics(address), Metrics(address)  # the port is taken: a warning, not an error
    metrics.show_progress("people", 3, 10)
    metrics.show_progress("faces", 1, 5)
    report = StageReport("people", counts=Counter({"ok": 7, "skip:no_person": 3}), reused=2, seconds=1.5)
    metrics.count(report)
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    second.close()
    metrics.close()
    for line in (
        'moviedreamer_items_total{outcome="ok",stage="people"} 7.0',
        'moviedreamer_items_total{outcome="skip:no_person",stage="people"} 3.0',
        'moviedreamer_items_reused_total{stage="people"} 2.0',
        'moviedreamer_stage_seconds_total{stage="people"} 1.5',
        'moviedreamer_items_waiting{stage="people"} 0.0',
        'moviedreamer_items_waiting{stage="faces"} 4.0',
        'moviedreamer_gpu_utilization_ratio{gpu="0"} 0.75',
        'moviedreamer_gpu_memory_used_bytes{gpu="0"} 1.073741824e+09',
    ):
        assert line in lines, line
