"""Ray on three hosts, one of which is cut off from the others in the middle of a stage.

    python -m tests.faults.hosts

The last line is one JSON object: how the stage ended, and how long after the cut. Hosts are network namespaces of this
machine, which share its file system; the bridge between them lies in the head's, so that nothing of the machine's own
network changes. Needs root and `ip`.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOTICES_LOSS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "2000",
    "RAY_grpc_client_keepalive_timeout_ms": "2000",
}
"""What has to be in the environment of head, workers and driver, or a lost host is noticed after a minute."""
PORT = 6379
OBJECT_STORE_BYTES = 100_000_000
PATIENCE_S = 90.0
FILMS = ("a", "b", "c", "d")


class NoHostsError(Exception):
    """This machine lets us make no hosts; says why."""


class Hosts:
    """A head without cores and workers of one core, each in a network namespace of its own."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder = folder
        self._python = Path(sys.executable)
        if " " in sys.executable:  # of which `ray start` makes shell lines without quotes
            (folder / "environment").symlink_to(sys.prefix)
            self._python = folder / "environment" / self._python.relative_to(sys.prefix)
        self._processes: list[subprocess.Popen] = []
        run = uuid.uuid4().hex[:8]
        self._names = [f"md-{run}-{index}" for index in range(workers + 1)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        ours = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
        ours["GLOO_SOCKET_IFNAME"] = "eth0"  # all hosts have this machine's name, which means 127.0.0.1
        self._environment = kept | NOTICES_LOSS | ours

    @property
    def address(self) -> str:
        """Where drivers join."""
        return f"{_host(0)}:{PORT}"

    def connect(self) -> None:
        """Lay the network.

        Raises:
            NoHostsError: The machine refuses.
        """
        head, *workers = self._names
        for name in self._names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", head, "link", "add", "eth0", "type", "bridge")
        for index, name in enumerate(workers, 1):
            peer = ("peer", "name", "eth0", "netns", name)
            _ip("-n", head, "link", "add", f"port{index}", "type", "veth", *peer)
            _ip("-n", head, "link", "set", f"port{index}", "master", "eth0", "up")
        for index, name in enumerate(self._names):
            _ip("-n", name, "address", "add", f"{_host(index)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def start(self) -> None:
        """Start Ray on every host, and wait until all have joined: a driver counts the cores once."""
        head, *workers = range(len(self._names))
        self._start(head, "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false", "--no-monitor")
        self._wait_for([head])  # a worker that finds no head tries again ever more slowly
        for worker in workers:
            self._start(worker, f"--address={self.address}", "--num-cpus=1")
        self._wait_for(workers)

    def _start(self, index: int, *words: str) -> None:
        ours = [f"--node-ip-address={_host(index)}", f"--temp-dir={self.folder / str(index)}"]
        ours += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-log-monitor=false", "--block"]
        self.call(index, "-m", "ray.scripts.scripts", "start", *words, *ours)

    def _wait_for(self, indexes: list[int]) -> None:
        for index in indexes:
            if not _comes_true(lambda index=index: "Ray runtime started" in self.log(index), self._processes[index]):
                raise RuntimeError(f"Ray did not start: {self.log(index)}")

    def log(self, index: int) -> str:
        """What a host's processes said last."""
        return (self.folder / f"log-{index}").read_text(errors="replace")[-3000:]

    def call(self, index: int, *words: str, **options: Any) -> subprocess.Popen:
        """Start Python on a host; it is ended with the hosts."""
        command = ["ip", "netns", "exec", self._names[index], str(self._python), *words]
        with (self.folder / f"log-{index}").open("ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log} | options
            process = subprocess.Popen(command, cwd=ROOT, env=self._environment, start_new_session=True, **streams)
        self._processes.append(process)
        return process

    def cut(self, worker: int) -> None:
        """Take a worker's link away. What runs there goes on, and no one hears of it."""
        _ip("-n", self._names[0], "link", "set", f"port{worker}", "down")

    def close(self) -> None:
        """End whatever runs on the hosts, and take them away."""
        for process in self._processes:  # one that was just started may not be on its host yet
            process.kill()
            process.wait()
        for name in self._names:
            _end_all(name)
            _try_ip("netns", "delete", name)


@contextmanager
def connected_hosts(workers: int = 2) -> Iterator[Hosts]:
    """Hosts on which nothing runs yet.

    Raises:
        NoHostsError: The machine refuses.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise NoHostsError("hosts on one machine need root and the program ip (package iproute2)")
    with tempfile.TemporaryDirectory(prefix="md-", dir="/tmp") as folder:  # short: sockets
        hosts = Hosts(Path(folder), workers)
        try:
            hosts.connect()
            yield hosts
        finally:
            hosts.close()


def _host(index: int) -> str:
    return f"10.99.0.{index + 1}"


def _try_ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def _ip(*words: str) -> None:
    answer = _try_ip(*words)
    if answer.returncode:
        raise NoHostsError(f"cannot make hosts on this machine: ip {' '.join(words)}: {answer.stderr.strip()}")


def _end_all(name: str) -> None:
    """Kill every process of a namespace, until none is left."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (pids := _try_ip("netns", "pids", name).stdout.split()):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)


def measure(hosts: Hosts, rows: int = 20) -> dict[str, Any]:
    """Run two stages on two workers; cut one off while both work on the second."""
    hosts.start()
    workspace = hosts.folder / "workspace"
    call = ["-m", "tests.faults.hosts", "--drive", str(workspace), "--address", hosts.address, "--rows", str(rows)]
    with hosts.call(0, *call, stdout=subprocess.PIPE) as driver:
        try:
            if not _comes_true(lambda: len(list(workspace.glob("scratch/double-*"))) == 2, driver):
                raise RuntimeError(f"the workers did not start: {hosts.log(0)}")
            time.sleep(1)
            hosts.cut(1)
            cut = time.monotonic()
            answer, _ = driver.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the stage did not end: {hosts.log(0)}") from error
        finally:
            driver.kill()
    if driver.returncode:
        raise RuntimeError(f"the driver failed: {hosts.log(0)}")
    result = json.loads(answer.splitlines()[-1])
    noticed, ended = result.pop("noticed"), result.pop("ended")
    return result | {"noticed_after_s": [round(at - cut, 1) for at in noticed], "ended_after_s": round(ended - cut, 1)}


def _comes_true(ready: Callable[[], bool], process: subprocess.Popen) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class _Losses(logging.Handler):
    """When units were taken back from workers that died."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "killed its worker" in record.getMessage():
            self.seen.append(time.monotonic())


def drive(address: str, workspace: Path, rows: int) -> dict[str, Any]:
    """Run the stages on the cluster, from a process on the head's host."""
    from stages.cluster import RayExecutor
    from storage.artifacts import read_rows
    from tests.stages.test_engine import Bench

    workspace.mkdir()
    losses = _Losses()
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("stages.cluster").addHandler(losses)
    bench = Bench(workspace, lambda settings: RayExecutor(settings, address, None))
    report = bench.double(bench.count(*FILMS, rows=rows), mode="slow")
    ended = time.monotonic()
    values = {film: [row["value"] for row in read_rows(bench.store, a.tables)] for film, a in report.done.items()}
    found = {
        "failed": report.failed,
        "counts": dict(report.counts),
        "values": values,
        "artifacts": len(bench.catalog.artifacts()),
        "noticed": losses.seen,
        "ended": ended,
    }
    bench.executor.close()
    bench.catalog.close()
    return found


def main() -> None:
    """Measure; with `--drive`, be the driver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20, help="of each film; a row takes 0.2 s")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.drive:
        result = drive(call.address, call.drive, call.rows)
    else:
        with connected_hosts() as hosts:
            result = measure(hosts, call.rows)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
