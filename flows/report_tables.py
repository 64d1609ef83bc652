"""Tables 1 and 2 of the paper, with the paper's own rows beside what was measured here.

Source: the paper, section 4, tables 1 and 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PAPER, HERE = "the paper", "moviedreamer"
OWN_MEASUREMENT = "The paper's rows are its authors' own measurements, on their own test films."


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number: Its number.
        title: What it compares.
        columns: Name of a number in `evaluation.json` to the column's heading.
        rows: Method to the paper's values, in the columns' order.
        notes: What a reader must know to compare.
    """

    number: int
    title: str
    columns: Mapping[str, str]
    rows: Mapping[str, Sequence[float]]
    notes: Sequence[str]


LOWER_IS_BETTER = ("FID",)
COMMON = {"CLIP score": "CLIP", "IS": "Inception", "aesthetic score": "Aesthetic"}
TABLES = (
    PaperTable(
        1,
        "story generation",
        COMMON | {"FID": "FID", "ST": "ST", "LT": "LT"},
        {
            "StoryDiffusion": (14.411, 8.515, 6.106, 4.643, 0.597, 0.612),
            "StoryGen": (13.378, 6.432, 3.791, 8.644, 0.514, 0.551),
            "MovieDreamer": (19.112, 9.709, 6.042, 2.012, 0.655, 0.836),
            "MovieDreamer, with references": (19.972, 9.800, 6.096, 1.879, 0.669, 0.851),
        },
        (
            OWN_MEASUREMENT,
            "FID: lower is better; not comparable with the paper's rows in absolute terms: here it takes the 2048 "
            "features of Inception-v3, and the paper does not tell which it took.",
        ),
    ),
    PaperTable(
        2,
        "full-length videos",
        COMMON | {"CLIP-sim": "CLIP-sim"},
        {
            "StreamingT2V": (15.304, 7.636, 4.119, 0.624),
            "SEINE": (19.404, 7.463, 5.825, 0.688),
            "FreeNoise": (14.327, 6.532, 3.194, 0.612),
            "MovieDreamer": (19.520, 8.642, 6.049, 0.704),
        },
        (OWN_MEASUREMENT, "Here both tables take the same pictures: one a frame of the story."),
    ),
)


def lay_out_tables(evaluations: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Both tables as plain JSON values: the paper's rows first, then one for each evaluation.

    Args:
        evaluations: Who made the pictures, to the list in `evaluation.json`.

    Returns:
        For each table its number, title, columns (name of the number, heading, which way is better), notes, and rows:
        method, who measured it, and values by the name of the number; null where there is none.
    """
    return [_lay_out(table, evaluations) for table in TABLES]


def _lay_out(table: PaperTable, evaluations: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    rows = [
        {"method": method, "measured_by": PAPER, "values": dict(zip(table.columns, values, strict=True))}
        for method, values in table.rows.items()
    ]
    for method, numbers in evaluations.items():
        known = {number["name"]: number["value"] for number in numbers}
        values = {name: known.get(name) for name in table.columns}
        rows.append({"method": method, "measured_by": HERE, "values": values})
    columns = [
        {"name": name, "heading": heading, "better": "lower" if name in LOWER_IS_BETTER else "higher"}
        for name, heading in table.columns.items()
    ]
    told = {"table": table.number, "title": table.title, "columns": columns}
    return told | {"rows": rows, "notes": list(table.notes)}
