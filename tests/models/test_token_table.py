"""The table of keyframe tokens: what was written is read back, whatever the order and the batches."""

import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.script import Character, FrameScript
from models.token_table import TokenTable, write_token_table

WIDTHS = {"tokens_per_frame": 2, "token_dim": 4, "text_width": 3}
FILMS = ("a film", "ß", "b")
VECTORS = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def make_row(film: str, frame: int, split: str = "train", faces: tuple[int, ...] = (0,)) -> dict[str, Any]:
    rng = np.random.default_rng([len(film), frame])
    people = [Character(identity=f"Person {c}", character_index=c if c >= 0 else None) for c in faces]
    script = FrameScript(characters=people, plot=["Person 1 is on the left."]).model_dump_json()
    tokens = rng.standard_normal((2, 4)).astype(np.float32)
    return {
        "film_id": film, "frame_index": frame, "time_s": frame / 10, "shot_index": 0, "split": split,
        "tokens": tokens, "mirrored_tokens": tokens[:, ::-1], "script": script, "mirrored_script": script,
        "sentence_embeddings": VECTORS[[frame % 4, 1]], "mirrored_sentence_embeddings": VECTORS[[1]],
        "face_character": list(faces), "face_embeddings": rng.standard_normal((len(faces), 5)).astype(np.float32),
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(*batches: list[dict[str, Any]], **widths: int) -> TokenTable:
        write_token_table(batches, tmp_path, WIDTHS | widths)
        return TokenTable(tmp_path)

    return write


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.tuples(st.sampled_from(FILMS), st.integers(0, 20)), unique=True, min_size=1, max_size=30),
    batch=st.integers(1, 7),
)
def test_rows_come_back_by_film_and_frame(keys, batch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a table")
    rows = [make_row(film, frame, faces=tuple(range(frame % 3))) for film, frame in keys]
    write_token_table([rows[at : at + batch] for at in range(0, len(rows), batch)], folder, WIDTHS)
    table = TokenTable(folder)
    wanted = sorted(rows, key=lambda row: (row["film_id"], row["frame_index"]))
    assert [table.key(row) for row in range(len(table))] == [(row["film_id"], row["frame_index"]) for row in wanted]
    for index, row in enumerate(wanted):
        np.testing.assert_array_equal(table.tokens(index), row["tokens"])
        np.testing.assert_array_equal(table.tokens(index, mirrored=True), row["mirrored_tokens"])
        np.testing.assert_array_equal(table.sentences(index), row["sentence_embeddings"])
        np.testing.assert_array_equal(table.sentences(index, mirrored=True), row["mirrored_sentence_embeddings"])
        for position, face in enumerate(row["face_embeddings"]):
            np.testing.assert_array_equal(table.face(index, position), face)
            assert (index, position) in table.faces_of(row["film_id"], position)
        assert table.script(index).plot == ["Person 1 is on the left."]
    assert table.films == [row["film_id"] for row in wanted]


def test_a_sentence_is_kept_once_a_batch(write, tmp_path):
    write([make_row("b", frame) for frame in range(8)], [make_row("b", frame) for frame in range(8, 12)])
    embeddings = pa.ipc.open_file(tmp_path / "sentences.arrow").read_all()["embedding"]
    assert [len(chunk) for chunk in embeddings.chunks] == [4, 4]


def test_nothing_is_held_in_memory(write):
    table = write([make_row("b", frame) for frame in range(3)])
    numbers = table.tokens(1)
    assert not numbers.flags.writeable and not numbers.flags.owndata


def test_runs_end_with_their_film_and_their_split(write):
    splits = {3: "heldout", 4: "heldout"}
    table = write(
        [make_row("b", frame, splits.get(frame, "train")) for frame in range(6)],
        [make_row("a film", frame) for frame in range(3)],
    )
    assert table.runs("train") == [range(3), range(3, 6), range(8, 9)]
    assert table.runs("heldout") == [range(6, 8)]
    assert (table.runs("test"), table.split_rows("test")) == ([], [])
    assert table.windows("train", 2) == [range(2), range(2, 3), range(3, 5), range(5, 6), range(8, 9)]
    assert table.training_rows_of("b") == [3, 4, 5, 8]
    assert (table.rows_of("b"), table.rows_of("c"), table.training_rows_of("c")) == (range(3, 9), range(0), [])


def test_characters_are_told_by_film(write):
    table = write([make_row("b", 0, faces=(2, -1)), make_row("b", 9, faces=())], [make_row("a film", 0, faces=(2, 5))])
    assert (table.characters("a film"), table.characters("b"), table.characters("c")) == ([2, 5], [2], [])
    assert (table.faces_of("b", 2), table.faces_of("b", 5), table.faces_of("c", 2)) == ([(1, 0)], [], [])
    own = [table.own_face(row, character) for row, character in ((0, 5), (0, 2), (1, 5), (2, 2))]
    assert own == [1, 0, None, None]


def test_another_process_reads_the_files_itself(write):
    table = write([make_row("b", frame) for frame in range(3)])
    data = pickle.dumps(table)
    assert len(data) < 500
    np.testing.assert_array_equal(pickle.loads(data).tokens(2), table.tokens(2))


def test_the_width_of_faces_is_found(write):
    assert write([make_row("b", 0, faces=())], [make_row("b", 1)]).widths["face_width"] == 5
    assert write([make_row("b", 0, faces=())]).widths["face_width"] == 1
    assert write([make_row("b", 0, faces=())], face_width=7).widths["face_width"] == 7


def test_a_table_without_rows(write):
    table = write()
    assert (len(table), table.runs("train"), table.characters("b")) == (0, [], [])
