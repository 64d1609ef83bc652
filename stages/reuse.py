"""Which items of a unit need not be computed, because an earlier result was made from the same rows.

A stage whose units are part files looks at each item by itself: its outcome follows from its own row and from the rows
of its frame in the other inputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from stages.spec import Ok, Outcome, Row, Skip, StageSpec
from storage.artifacts import read_rows
from storage.objects import ObjectStore, StoredFile


@dataclass(frozen=True)
class Earlier:
    """What the same stage with the same settings made of the same subject from other inputs.

    Attributes:
        inputs: Role to the files that it read.
        files: What it wrote, rejects included.
    """

    inputs: dict[str, tuple[StoredFile, ...]]
    files: tuple[StoredFile, ...]


def find_kept(
    store: ObjectStore, spec: StageSpec, earlier: Earlier, items: list[Row], others: dict[str, list[Row]]
) -> dict[str, Outcome]:
    """Earlier outcomes of the items whose own row and whose frame's rows of the other inputs are as they were.

    Args:
        store: Where the files of the earlier result are.
        spec: The stage.
        earlier: Its result.
        items: Rows of the first input now, at least one.
        others: Role to the rows of the other inputs now.

    Returns:
        Item to outcome.
    """
    frames = [row["frame_index"] for row in items]
    span = min(frames), max(frames)
    first, *rest = spec.inputs
    before = {row["frame_index"]: row for row in read_rows(store, earlier.inputs[first], span)}
    now = {role: _by_frame(rows) for role, rows in others.items()}
    then = {role: _by_frame(read_rows(store, earlier.inputs[role], span)) for role in rest}
    rejects = [f for f in earlier.files if f.name.startswith("rejects-")]
    rejected = {row["item"]: row for row in read_rows(store, rejects)}
    made = _by_frame(read_rows(store, [f for f in earlier.files if f not in rejects], span))
    kept: dict[str, Outcome] = {}
    for row in items:
        item, frame = spec.item_of(row), row["frame_index"]
        if before.get(frame) != row or any(now[role].get(frame) != then[role].get(frame) for role in rest):
            continue
        if item not in rejected:
            kept[item] = Ok(item, made.get(frame, []))
        elif rejected[item]["outcome"] == "skip":
            kept[item] = Skip(item, rejected[item]["reason"])
    return kept


def _by_frame(rows: Iterable[Row]) -> dict[int, list[Row]]:
    frames: dict[int, list[Row]] = {}
    for row in rows:
        frames.setdefault(row["frame_index"], []).append(row)
    return frames
