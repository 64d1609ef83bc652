"""One unit again: on the inputs that it failed on, or on a film's current ones; nothing is kept."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.replay import replay
from flows.workspace import Workspace
from models import weights
from stages.errors import UsageError
from tests.flows.ingested import PROFILE, ingest_in_process, profile_with

FILM = weights.folder("demo_films") / "carphone_pristine.mp4"
INLINE = profile_with("engine.executor=inline", "keyframes.every_n_frames=60")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    broken = folder / "a broken - film.mp4"
    broken.write_bytes(b"not a film")
    opened = Workspace.open(folder / "w")
    ingest_in_process(opened, INLINE, [FILM, broken])
    yield opened
    opened.catalog.close()


def test_a_unit_of_a_film_gives_what_was_committed_and_keeps_nothing(workspace, tmp_path):
    before = workspace.store.keys()
    done = replay(workspace, INLINE, f"people/{FILM.name}#0", tmp_path / "out")
    assert done["counts"] == {"ok": 2}
    committed = workspace.catalog.current("people", FILM.name)
    again = pq.read_table(next(path for path in done["files"] if "part-" in path)).drop(["mask_png"])
    assert again == pq.read_table(workspace.store.path(committed.tables[0])).drop(["mask_png"])
    assert workspace.store.keys() == before


def test_a_failed_unit_runs_on_what_it_failed_on(workspace, tmp_path):
    done = replay(workspace, INLINE, "keyframes/a broken - film.mp4", tmp_path)
    assert done["counts"] == {"fail": 1}
    assert "a broken - film.mp4" in done["rejects"][0]["reason"]


def test_an_error_comes_through_as_it_was_raised(workspace, tmp_path):
    part = workspace.catalog.current("keyframes", FILM.name).tables[0]
    path = workspace.store.path(part)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(pa.ArrowInvalid):
            replay(workspace, INLINE, f"people/{FILM.name}", tmp_path)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("people", "expected STAGE/SUBJECT"),
        ("peeple/x", "with a stage of keyframes, people"),
        ("people/nobody.mp4", "its inputs are not there"),
        ("keyframes/nobody.mp4", "its inputs are not there"),
        ("render/story", "only stages of films can be replayed"),
        (f"people/{FILM.name}#7", "expected an index below 1"),
    ],
)
def test_a_unit_that_is_not_there_is_named(workspace, tmp_path, unit, message):
    with pytest.raises(UsageError, match=message):
        replay(workspace, PROFILE, unit, tmp_path)
