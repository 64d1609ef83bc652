import threading

import pytest

from storage.artifacts import Artifact, Recipe, artifact_id, content_digest
from storage.catalog import Catalog
from storage.errors import CatalogError
from storage.objects import StoredFile
from storage.plan import decide


def make(kind="people", subject="film a", config=None, content="1", inputs=()):
    recipe = Recipe(kind, 1, config or {}, {}, {"keyframes": ["d"]})
    files = (StoredFile("part-00000.parquet", content * 64, 10, 2),)
    return Artifact(
        artifact_id(kind, subject, recipe.fingerprint), kind, subject, recipe.fingerprint, content_digest(files),
        {**recipe.__dict__}, files, inputs, {"ok": 2}, {}, 1.5,
    )  # fmt: skip


def recipe_of(made):
    return Recipe(**made.recipe)


def test_commit_and_find(catalog):
    made = catalog.commit(make(inputs=("keyframes-1",)))
    assert catalog.find("people", "film a", made.fingerprint) == made
    assert catalog.current("people", "film a") == made
    assert catalog.artifacts() == [made]
    assert made.inputs == ("keyframes-1",)
    assert made.as_dict()["rows"] == 2


def test_many_are_found_at_once_each_by_its_own_recipe(catalog):
    subjects = [f"film {number}" for number in range(1201)]
    made = {subject: catalog.commit(make(subject=subject)) for subject in subjects[::100]}
    catalog.commit(make(subject="film 100", config={"max_people": 1}))
    catalog.commit(make(kind="faces", subject="film 1"))
    asked = dict.fromkeys(subjects, make().fingerprint) | {"film 200": make(config={"max_people": 1}).fingerprint}
    found = catalog.find_all("people", asked)
    del made["film 200"]
    assert found == made
    assert catalog.find_all("people", {}) == {}


def test_commit_twice_keeps_the_first(catalog):
    first = catalog.commit(make())
    assert catalog.commit(make(content="2")).digest == first.digest
    assert len(catalog.artifacts()) == 1


def test_commit_removes_unit_rows(catalog):
    made = make()
    catalog.save_unit(("people", "film a", made.fingerprint, 0), "done", 1, {"x": 1})
    assert catalog.units("people", "film a", made.fingerprint)[0]["result"] == {"x": 1}
    catalog.commit(made)
    assert catalog.units("people", "film a", made.fingerprint) == {}


def test_decisions_and_their_reasons(catalog):
    made = make(config={"max_people": 5})
    assert decide(catalog, "people", "film a", recipe_of(made)).state == "missing"
    catalog.commit(made)
    assert decide(catalog, "people", "film a", recipe_of(made)).artifact == catalog.artifact(made.id)
    changed = Recipe("people", 2, {"max_people": 3}, {"w": "1"}, {"keyframes": ["e"]})
    decision = decide(catalog, "people", "film a", changed)
    assert decision.state == "stale"
    assert decision.reason == (
        "people: stage version 1 -> 2, config.max_people 5 -> 3, weights w changed, input keyframes changed"
    )
    catalog.save_unit(
        ("people", "film a", changed.fingerprint, 0), "failed", 1, {"error": "bad film", "retryable": False}
    )
    assert decide(catalog, "people", "film a", changed).reason == "bad film"
    catalog.save_unit(("people", "film a", changed.fingerprint, 0), "failed", 1, {"error": "net", "retryable": True})
    assert decide(catalog, "people", "film a", changed).state == "stale"


def test_snapshot_names_keep_their_first_list(catalog):
    catalog.save_snapshot("s", ["a", "b"])
    catalog.save_snapshot("s", ["a", "b"])
    with pytest.raises(CatalogError, match="choose another name"):
        catalog.save_snapshot("s", ["a"])
    assert catalog.snapshot("s") == ["a", "b"]
    assert catalog.snapshot("t") is None


def test_writers_at_once_all_commit(catalog):
    def commit(number):
        mine = Catalog(catalog.url)
        for index in range(10):
            mine.commit(make(subject=f"film {number}-{index}"))
        mine.close()

    threads = [threading.Thread(target=commit, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(catalog.artifacts()) == 40


def test_unusable_catalog_is_named(tmp_path):
    path = tmp_path / "catalog.sqlite"
    path.write_text("this is not a database " * 100)
    with pytest.raises(CatalogError, match="cannot open the catalog"):
        Catalog(f"sqlite:///{path}")
