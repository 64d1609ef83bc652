"""Tells the catalog every few seconds that a run is alive and how far it is: what `moviedreamer status` reads."""

import logging
import threading
from typing import Any

from storage.catalog import Catalog
from storage.errors import StorageError

log = logging.getLogger(__name__)

PERIOD_S = 5.0


class Heartbeat:
    """A thread that beats for a run until it is closed.

    Attributes:
        progress: How far the run is: `stage`, `done`, `total`, `message`; None between stages.
    """

    def __init__(self, catalog: Catalog, run_id: str) -> None:
        self.progress: dict[str, Any] | None = None
        self._catalog, self._run_id = catalog, run_id
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._closing.wait(PERIOD_S):
            try:
                self._catalog.beat(self._run_id, self.progress)
            except StorageError as error:  # the work itself will meet it too, and say so
                log.debug("no heartbeat: %s", error)

    def close(self) -> None:
        """Stop beating."""
        self._closing.set()
        self._thread.join()
