"""The one bridge to Prefect: a stage on a batch of subjects becomes a task run, with what it did on its page."""

import base64
import io
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from tqdm import tqdm

from flows.heartbeat import Heartbeat
from flows.metrics import Metrics
from flows.pipeline import Runner, compute
from flows.workspace import Workspace
from stages.engine import Executor, StageReport, Work
from stages.spec import StageSpec
from storage.artifacts import read_rows

GPU_LIMIT = "gpu"
"""Name of the global concurrency limit over all flows; without such a limit on the server, nothing waits."""
PROGRESS_PERIOD_S = 3.0
PAGE_ROWS = 200
PICTURES = {"keyframes": "jpeg", "faces": "jpeg"}
PICTURES_SHOWN = 12


@dataclass(frozen=True)
class Watch:
    """Who is told how far a run is, besides the terminal and the run page."""

    heartbeat: Heartbeat
    metrics: Metrics

    def show(self, stage: str, done: float, total: float, message: str) -> None:
        """A stage came so far."""
        self.heartbeat.progress = {"stage": stage, "done": round(done, 1), "total": total, "message": message}
        self.metrics.show_progress(stage, done, total)

    def finish(self, report: StageReport) -> None:
        """A stage is through."""
        self.heartbeat.progress = None
        self.metrics.count(report)


def make_runner(workspace: Workspace, executor: Executor, run_id: str, watch: Watch) -> Runner:
    """A runner that makes each stage a Prefect task run. Stages on accelerators hold a slot of the limit `gpu`.

    The works stay in this process; Prefect sees a stage's name and a few subjects, never a big parameter.
    """

    def run_stage(spec: StageSpec, works: Sequence[Work]) -> StageReport:
        @task(name=spec.name, cache_policy=NO_CACHE, persist_result=False, tags={"stage"})
        def stage_task(stage: str, subjects: int, examples: list[str]) -> StageReport:
            with gpu_slot(spec.gpus_for(works[0].config)), StageProgress(stage, watch) as progress:
                report = compute(workspace, executor, run_id, works, progress)
            watch.finish(report)
            publish(workspace, report)
            return report

        return stage_task(spec.name, len(works), [work.subject for work in works[:5]])

    return run_stage


def gpu_slot(gpus: float) -> AbstractContextManager[None]:
    """Holds a slot of the limit `gpu`, where the server has such a limit, while a stage on accelerators runs."""
    if gpus:
        try:
            with get_client(sync_client=True) as client:
                client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            return nullcontext()
        return concurrency(GPU_LIMIT, occupy=1)
    return nullcontext()


class StageProgress:
    """Shows progress on the terminal (stderr) and on the run page."""

    def __init__(self, stage: str, watch: Watch) -> None:
        self._stage, self._watch = stage, watch
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            desc=f"{stage:>20}", total=1, file=sys.stderr, unit="item", mininterval=0.2 if interactive else 10,
            dynamic_ncols=interactive, bar_format="{desc} {percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {postfix}",
        )  # fmt: skip
        self._page = create_progress_artifact(progress=0.0, key=page_key(stage, "progress"), description=stage)
        self._posted = time.monotonic()

    def __call__(self, done: float, total: float, message: str) -> None:
        """See `stages.engine.UnitProgress`."""
        self._watch.show(self._stage, done, total, message)
        self._bar.total = max(total, 1e-9)
        self._bar.n = min(done, total)
        self._bar.set_postfix_str(message, refresh=False)
        self._bar.update(0)
        if (now := time.monotonic()) - self._posted >= PROGRESS_PERIOD_S:
            self._posted = now
            if not sys.stderr.isatty():
                self._bar.refresh()
            update_progress_artifact(self._page, progress=100 * done / max(total, 1e-9))

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, *error: Any) -> None:
        if not any(error):
            self._bar.n = self._bar.total
            update_progress_artifact(self._page, progress=100.0)
        self._bar.close()


def page_key(*parts: str) -> str:
    """A key for the run page: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def publish(workspace: Workspace, report: StageReport) -> None:
    """Put what a stage did on the run page: subjects with counts, rejects by reason, links, pictures."""
    rows = [
        {
            "subject": subject,
            "artifact": artifact.id,
            "rows": artifact.rows,
            "rejects": sum(n for reason, n in artifact.counts.items() if reason != "ok"),
            "seconds": round(artifact.seconds, 1),
        }
        for subject, artifact in sorted(report.done.items())
    ]
    rows += [{"subject": subject, "error": error} for subject, error in sorted(report.failed.items())]
    create_table_artifact(table=rows[:PAGE_ROWS], key=page_key(report.stage, "subjects"), description=report.line())
    rejects = Counter({reason: n for reason, n in report.counts.items() if reason != "ok"})
    if rejects:
        table = [{"reason": reason, "items": n} for reason, n in rejects.most_common()]
        create_table_artifact(
            table=table, key=page_key(report.stage, "rejects"), description="Rejected items by reason"
        )
    _publish_results(workspace, report)


def _publish_results(workspace: Workspace, report: StageReport) -> None:
    lines = []
    for subject, artifact in sorted(report.done.items())[:PAGE_ROWS]:
        paths = ", ".join(f"`{stored.name}`: `{workspace.store.uri}/{stored.key}`" for stored in artifact.files[:3])
        summary = f"\n\n```json\n{json.dumps(artifact.summary, indent=1)[:2000]}\n```" if artifact.summary else ""
        lines.append(f"* **{subject}** {artifact.id}: {paths}{summary}")
    if lines:
        create_markdown_artifact(
            "\n".join(lines), key=page_key(report.stage, "artifacts"), description="Where it is kept"
        )
    if report.stage in PICTURES and report.done:
        sheet = _contact_sheet(workspace, report, PICTURES[report.stage])
        if sheet:
            create_image_artifact(sheet, key=page_key(report.stage, "pictures"), description=f"Some {report.stage}")


def _contact_sheet(workspace: Workspace, report: StageReport, column: str) -> str | None:
    """A few pictures of a stage's result, side by side, as a data URI."""
    from PIL import Image

    tiles = []
    per_film = max(1, PICTURES_SHOWN // len(report.done))
    for _, artifact in sorted(report.done.items()):
        rows = [row[column] for row in read_rows(workspace.store, artifact.tables[:1])]
        tiles += rows[:: max(1, len(rows) // per_film)][:per_film]
    if not tiles:
        return None
    width, height = 160, 90
    sheet = Image.new("RGB", (width * min(4, len(tiles)), height * -(-len(tiles) // 4)))
    for index, tile in enumerate(tiles[: PICTURES_SHOWN * 2]):
        picture = Image.open(io.BytesIO(tile)).convert("RGB")
        picture.thumbnail((width, height))
        sheet.paste(picture, (index % 4 * width, index // 4 * height))
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
