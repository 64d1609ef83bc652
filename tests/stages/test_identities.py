import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.identities import SPEC, Identities, IdentitiesConfig
from stages.spec import Ok, Row

ANNA, BERT, CARL = (np.eye(128)[i] for i in range(3))


def face(frame_index: int, identity: np.ndarray, face_index: int = 0, noise: float = 0.02, **changes: float) -> Row:
    generator = np.random.default_rng((frame_index, face_index))
    row = {"film_id": "film", "frame_index": frame_index, "face_index": face_index, "score": 0.9, "sharpness": 100.0}
    row |= {"x0": 0.0, "y0": 0.0, "x1": 80.0, "y1": 100.0}
    return row | {"identity": (identity + noise * generator.standard_normal(128)).tolist()} | changes


def run(faces: list[Row], **settings: float) -> dict[str, Row]:
    outcomes = list(Identities(IdentitiesConfig(**settings))(faces=faces))
    assert all(isinstance(outcome, Ok) for outcome in outcomes)
    assert [outcome.item for outcome in outcomes] == [SPEC.item_of(row) for row in faces]
    return {outcome.item: row for outcome in outcomes for row in outcome.rows}


def characters(faces: list[Row], **settings: float) -> list[int | None]:
    return [row["character_index"] for row in run(faces, **settings).values()]


def test_characters_come_by_screen_time_then_first_appearance() -> None:
    faces = [face(i, CARL) for i in (0, 5, 9)] + [face(i, ANNA) for i in (10, 20, 30)]
    faces += [face(i, BERT) for i in (40, 50, 60, 70)]
    assert characters(faces) == [1, 1, 1, 2, 2, 2, 0, 0, 0, 0]


def test_rows_fit_the_schema_and_unclustered_faces_stay_visible() -> None:
    faces = [face(i, ANNA) for i in (1, 2, 3)] + [face(4, BERT)]
    table = pa.Table.from_pylist(list(run(faces).values()), schema=SPEC.schema).to_pylist()
    assert [row["character_index"] for row in table] == [0, 0, 0, None]
    assert table[3]["distance"] is None and table[3]["representative"] is False
    assert all(0 < row["distance"] < 0.5 for row in table[:3])


@pytest.mark.parametrize("poor", [{"sharpness": 0.1}, {"score": 0.2}, {"x1": 10.0}])
def test_a_poor_face_joins_but_does_not_bridge(poor: dict[str, float]) -> None:
    between = (ANNA + BERT) / 2
    good = [face(i, ANNA) for i in (1, 2, 3)] + [face(i, BERT) for i in (4, 5, 6)]
    bridge = [face(i, between, **poor) for i in (7, 8, 9)]
    assert characters(good + bridge) == [0, 0, 0, 1, 1, 1, None, None, None]
    assert characters([*good, face(7, ANNA, **poor)]) == [0, 0, 0, 1, 1, 1, 0]
    assert characters([face(i, ANNA, **poor) for i in (1, 2, 3)]) == [None] * 3


def test_two_faces_of_a_keyframe_are_two_characters() -> None:
    faces = [face(i, ANNA, face_index) for i in range(3) for face_index in (0, 1)]
    found = characters(faces, min_cluster_faces=1)
    assert None not in found and all(found[i] != found[i + 1] for i in (0, 2, 4))


def test_more_faces_than_the_limit_join_what_the_sharpest_form() -> None:
    faces = [face(i, (ANNA, BERT)[i % 2], sharpness=100.0 - i) for i in range(20)]
    assert characters(faces, max_clustered_faces=8) == [0, 1] * 10


def test_representatives_are_few_and_there_is_one_for_each_character() -> None:
    faces = [face(i, ANNA) for i in range(12)] + [face(20 + i, BERT) for i in range(3)]
    rows = list(run(faces, representatives=4).values())
    assert sum(row["representative"] for row in rows[:12]) == 4
    assert sum(row["representative"] for row in rows[12:]) == 3


@given(st.permutations(range(14)))
@settings(deadline=None, max_examples=25)
def test_the_order_of_the_input_does_not_matter(order: list[int]) -> None:
    faces = [face(i, (ANNA, BERT, CARL)[i % 3], noise=0.03, sharpness=float(i % 5 * 10)) for i in range(14)]
    assert run([faces[i] for i in order]) == run(faces)


def test_a_film_without_faces_and_one_with_a_single_face() -> None:
    assert run([]) == {}
    assert characters([face(3, ANNA)]) == [None]
    assert characters([face(3, ANNA)], min_cluster_faces=1) == [0]


def test_nothing_is_good_enough() -> None:
    assert characters([face(i, ANNA, sharpness=0.0) for i in range(5)]) == [None] * 5
