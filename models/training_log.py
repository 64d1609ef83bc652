"""What a training run tells while it goes on: TensorBoard always, and a tracker of the user's choice.

Nothing of it enters results. Addresses and keys of trackers come from the trackers' own environment variables
(MLFLOW_TRACKING_URI, WANDB_API_KEY, ...), never from settings.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from models.processes import process_index

log = logging.getLogger(__name__)

Tracker = Literal["none", "mlflow", "wandb"]
PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
"""What is to be installed for a tracker."""
PROJECT = "moviedreamer"
RUN_ID = "mlflow-run"
"""The file beside TensorBoard's that keeps MLflow's name of a run that goes on."""


class TrackerError(ValueError):
    """A tracker cannot be used; the message names it and the remedy."""


def load_tracker(tracker: Tracker) -> Any:
    """The tracker's package; None for none.

    Raises:
        TrackerError: It is not installed.
    """
    if tracker == "none":
        return None
    try:
        return importlib.import_module(tracker)
    except ImportError as error:
        raise TrackerError(
            f"tracker {tracker!r} cannot be imported ({error}): run `pip install {PACKAGES[tracker]}` where training "
            "runs, or set tracker: none"
        ) from error


class TrainingLog:
    """Writes numbers by step. A run that goes on from a checkpoint goes on in the same log.

    Args:
        folder: TensorBoard's: `tensorboard --logdir` on it or on a folder above shows the run.
        tracker: Where numbers go beside.
        settings: Of the run, for the tracker.
        step: Steps taken so far; numbers after it are replaced.

    Raises:
        TrackerError: The tracker is not installed.
    """

    def __init__(self, folder: Path, tracker: Tracker, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._tracker, self._package, self._silent = tracker, load_tracker(tracker), False
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        if tracker == "mlflow":
            self._start_mlflow(folder, settings)
        elif tracker == "wandb":
            self._run = self._package.init(
                project=PROJECT, name=folder.name, id=folder.name, resume="allow", config=dict(settings), dir=folder
            )

    def _start_mlflow(self, folder: Path, settings: Mapping[str, Any]) -> None:
        known = folder / RUN_ID
        if known.is_file():
            self._package.start_run(run_id=known.read_text())
            return
        self._package.set_experiment(PROJECT)
        known.write_text(self._package.start_run(run_name=folder.name).info.run_id)
        self._package.log_params(dict(settings))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one step."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        try:
            if self._tracker == "mlflow":
                self._package.log_metrics(dict(numbers), step=step)
            elif self._tracker == "wandb":
                self._run.log(dict(numbers), step=step)
        except Exception as error:  # whatever it is: training is worth more than its log
            if not self._silent:
                log.warning(
                    "%s does not take numbers (%s): training goes on, TensorBoard has them", self._tracker, error
                )
            self._silent = True

    def close(self) -> None:
        """Write what is left; the run is over or interrupted."""
        self._writer.close()
        if self._tracker == "mlflow":
            self._package.end_run()
        elif self._tracker == "wandb":
            self._run.finish()


@contextmanager
def open_log(
    folder: Path, tracker: Tracker, settings: Mapping[str, Any], step: int
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """`TrainingLog.write` of a log that is closed at the end; in all processes but the first, numbers go nowhere."""
    if process_index() > 0:
        yield lambda step, numbers: None
        return
    log = TrainingLog(folder, tracker, settings, step)
    try:
        yield log.write
    finally:
        log.close()
