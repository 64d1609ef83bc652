"""What Prometheus reads while a run goes on: items, seconds, rejects by stage, what waits, and the use of GPUs."""

import logging
import shutil
import subprocess
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily

from stages.engine import StageReport

log = logging.getLogger(__name__)

GPU_QUERY = ("index", "utilization.gpu", "memory.used", "memory.total")


class Metrics:
    """Metrics of one run, served at `/metrics` of an address until it is closed.

    Args:
        address: `host:port`; a port that is taken is a warning, because a run is worth more than its metrics. None
            serves nothing.
    """

    def __init__(self, address: str | None) -> None:
        self.registry = CollectorRegistry()
        named = {"namespace": "moviedreamer", "registry": self.registry}
        self._items = Counter("items", "Items by outcome", ["stage", "outcome"], **named)
        self._reused = Counter("items_reused", "Items taken over from an earlier result", ["stage"], **named)
        self._subjects = Counter("subjects", "Films, shards and jobs by outcome", ["stage", "outcome"], **named)
        self._seconds = Counter("stage_seconds", "Wall seconds", ["stage"], **named)
        self._waiting = Gauge("items_waiting", "Items that wait or are worked on", ["stage"], **named)
        self.registry.register(GpuUse())
        self._server = None
        if address:
            host, _, port = address.rpartition(":")
            try:
                self._server, self._thread = start_http_server(int(port), host or "0.0.0.0", self.registry)
            except OSError as error:
                log.warning("no metrics at %s: %s", address, error)

    def show_progress(self, stage: str, done: float, total: float) -> None:
        """How much of a stage is still to come."""
        self._waiting.labels(stage).set(max(0.0, total - done))

    def count(self, report: StageReport) -> None:
        """What a stage came to."""
        for outcome, count in report.counts.items():
            self._items.labels(report.stage, outcome).inc(count)
        self._reused.labels(report.stage).inc(report.reused)
        self._subjects.labels(report.stage, "done").inc(len(report.done))
        self._subjects.labels(report.stage, "failed").inc(len(report.failed))
        self._seconds.labels(report.stage).inc(report.seconds)
        self._waiting.labels(report.stage).set(0)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class GpuUse:
    """Use and memory of NVIDIA GPUs, asked of `nvidia-smi` when Prometheus reads; nothing where there is none."""

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The same names whether or not there is a GPU."""
        yield from self._families([])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One sample for each GPU."""
        yield from self._families(read_gpus())

    def _families(self, rows: list[list[float]]) -> Iterator[GaugeMetricFamily]:
        names = ("gpu_utilization_ratio", "gpu_memory_used_bytes", "gpu_memory_bytes")
        helps = ("Share of time in which a kernel ran", "Memory in use", "Memory in all")
        for column, (name, about) in enumerate(zip(names, helps, strict=True), 1):
            family = GaugeMetricFamily(f"moviedreamer_{name}", about, labels=["gpu"])
            scale = 0.01 if column == 1 else 2**20
            for row in rows:
                family.add_metric([f"{row[0]:.0f}"], row[column] * scale)
            yield family


def read_gpus() -> list[list[float]]:
    """`GPU_QUERY` of each GPU of this machine: index, percent, MiB, MiB."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    call = [program, f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout
        return [[float(value) for value in line.split(",")] for line in text.strip().splitlines()]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.debug("nvidia-smi did not answer: %s", error)
        return []
