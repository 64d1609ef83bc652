import json

from flows.report_tables import TABLES, lay_out_tables

NUMBERS = [
    {"name": "CLIP score", "value": 20.5}, {"name": "IS", "value": None}, {"name": "FID", "value": 120.25},
    {"name": "LT", "value": 0.5}, {"name": "CLIP-sim", "value": 0.75}, {"name": "FD-DINOv2", "value": 7.0},
]  # fmt: skip


def test_the_papers_rows_are_the_papers():
    first, second = lay_out_tables({})
    methods = {row["method"]: row["values"] for row in first["rows"]}
    assert list(first["rows"][0]["values"]) == ["CLIP score", "IS", "aesthetic score", "FID", "ST", "LT"]
    assert methods["MovieDreamer, with references"] == {
        "CLIP score": 19.972, "IS": 9.8, "aesthetic score": 6.096, "FID": 1.879, "ST": 0.669, "LT": 0.851,
    }  # fmt: skip
    assert [row["method"] for row in second["rows"]] == ["StreamingT2V", "SEINE", "FreeNoise", "MovieDreamer"]
    assert second["rows"][1]["values"]["CLIP-sim"] == 0.688
    assert {row["measured_by"] for row in (*first["rows"], *second["rows"])} == {"the paper"}
    assert all(len(values) == len(table.columns) for table in TABLES for values in table.rows.values())


def test_what_was_scored_here_stands_below_and_gaps_stay_gaps():
    first, second = lay_out_tables({"this workspace (heist)": NUMBERS, "seine (heist)": []})
    ours, other = first["rows"][-2:]
    assert (ours["method"], ours["measured_by"]) == ("this workspace (heist)", "moviedreamer")
    assert ours["values"] == {
        "CLIP score": 20.5, "IS": None, "aesthetic score": None, "FID": 120.25, "ST": None, "LT": 0.5,
    }  # fmt: skip
    assert set(other["values"].values()) == {None}
    assert second["rows"][-2]["values"]["CLIP-sim"] == 0.75 and "LT" not in second["rows"][-2]["values"]
    assert json.loads(json.dumps([first, second])) == [first, second]


def test_fid_is_said_not_to_be_comparable_and_the_only_one_to_be_low():
    first, second = lay_out_tables({})
    assert any("FID" in note and "not comparable" in note for note in first["notes"])
    assert all(any("own measurements" in note for note in table["notes"]) for table in (first, second))
    assert any("same pictures" in note for note in second["notes"])
    lower = [column["name"] for table in (first, second) for column in table["columns"] if column["better"] == "lower"]
    assert lower == ["FID"]
