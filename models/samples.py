"""Samples of a training shard, read with webdataset.

Only the member names that this project writes are decoded; anything else in a tar stays bytes, so that no member
can run code.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("WDS_SECURE", "1")  # no `pipe:` URLs, no pickles: read before webdataset is imported

from webdataset.tariterators import group_by_keys, tar_file_expander


def read_samples(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Samples of the shards, in order.

    Args:
        paths: Local files of shards; only tars are read, not the indexes beside them.

    Yields:
        A dict with `__key__`, `jpg` (bytes), `json` (dict), `faces.npy` (float32 [face, width]), `identities.npy`
        (float32 [face, width]) and `person0.jpg` ... (bytes).
    """
    for path in filter(lambda path: Path(path).suffix == ".tar", paths):
        with Path(path).open("rb") as stream:
            members = tar_file_expander([{"url": str(path), "stream": stream}])
            for sample in group_by_keys(members):
                yield {name: _decode(name, value) for name, value in sample.items() if name != "__url__"}


def _decode(name: str, value: Any) -> Any:
    if name == "json":
        return json.loads(value)
    if name.endswith(".npy"):
        return np.load(io.BytesIO(value), allow_pickle=False)
    return value
