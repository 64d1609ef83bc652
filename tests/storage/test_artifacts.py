import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from storage.artifacts import Recipe, TableWriter, artifact_id, digest_json, read_rows
from storage.objects import ObjectStore

SCHEMA = pa.schema([("frame_index", pa.int64()), ("name", pa.string())])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x), max_leaves=8
)


@given(st.dictionaries(st.text(), JSON))
def test_digest_is_independent_of_key_order(value):
    assert digest_json(value) == digest_json(dict(reversed(list(value.items()))))


def test_fingerprint_changes_with_each_part_of_the_recipe():
    base = {"stage": "s", "version": 1, "config": {"a": 1}, "weights": {"w": "1"}, "inputs": {"i": ["d"]}}
    changed = [{"stage": "t"}, {"version": 2}, {"config": {"a": 2}}, {"weights": {"w": "2"}}, {"inputs": {"i": ["e"]}}]
    prints = {Recipe(**base).fingerprint} | {Recipe(**(base | change)).fingerprint for change in changed}
    assert len(prints) == 6


def test_ids_differ_for_subjects_with_the_same_recipe():
    assert artifact_id("k", "a", "f") != artifact_id("k", "b", "f")


def test_writer_rolls_parts_and_reads_back(tmp_path):
    store = ObjectStore(str(tmp_path / "objects"))
    writer = TableWriter(tmp_path, SCHEMA, "part", part_rows=100)
    rows = [{"frame_index": i * 30, "name": f"row {i}"} for i in range(250)]
    for row in rows:
        writer.write(row)
    parts = writer.close()
    assert [count for _, count in parts] == [100, 100, 50]
    files = [store.put(path, path.name, count) for path, count in parts]
    assert list(read_rows(store, files)) == rows
    assert [r["frame_index"] for r in read_rows(store, files, (2970, 3030))] == [2970, 3000, 3030]


def test_empty_table_is_one_file(tmp_path):
    writer = TableWriter(tmp_path, SCHEMA, "part", 100)
    assert [count for _, count in writer.close()] == [0]
    assert TableWriter(tmp_path, SCHEMA, "rejects", 100).close(keep_empty=False) == []


def test_same_rows_give_the_same_bytes(tmp_path):
    contents = []
    for run in "ab":
        (tmp_path / run).mkdir()
        writer = TableWriter(tmp_path / run, SCHEMA, "part", 100)
        for i in range(150):
            writer.write({"frame_index": i, "name": "x"})
        contents.append([path.read_bytes() for path, _ in writer.close()])
    assert contents[0] == contents[1]
