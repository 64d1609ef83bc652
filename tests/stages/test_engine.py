import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.cluster import Board, RayExecutor, RemoteWorker
from stages.engine import Engine, InlineExecutor, Work
from stages.worker import WorkerSettings
from storage.artifacts import read_rows
from storage.catalog import Catalog
from storage.garbage import find_loose_objects
from storage.objects import ObjectStore
from tests.stages.tiny_stages import (
    COUNT,
    DOUBLE,
    TELL,
    TOTAL,
    CountConfig,
    DoubleConfig,
    TellConfig,
    TotalConfig,
)


class Bench:
    """An engine on a fresh workspace, and short ways to run the tiny stages."""

    def __init__(self, folder, executor=None, backend=None):
        catalog, objects = backend or (f"sqlite:///{folder / 'catalog.sqlite'}", str(folder / "objects"))
        self.catalog = Catalog(catalog)
        self.store = ObjectStore(objects, folder / "cache")
        self.settings = WorkerSettings(self.store.uri, folder / "scratch", None)
        self.executor = executor(self.settings) if executor else InlineExecutor(self.settings)
        self.engine = Engine(self.catalog, self.store, self.executor)

    def run(self, works):
        return self.engine.run(works, lambda done, total, message: None)

    def count(self, *films, rows=10):
        works = [
            Work(COUNT, CountConfig(rows=rows), f, {}, {}, ({"film_id": f, "uri": f}, f"digest of {f}")) for f in films
        ]
        return self.run(works)

    def double(self, counted, **config):
        return self.run([Work(DOUBLE, DoubleConfig(**config), f, {"count": [a]}, {}) for f, a in counted.done.items()])

    def tell(self, *films, **config):
        counted = self.count(*films)
        return self.run([Work(TELL, TellConfig(**config), f, {"count": [counted.done[f]]}, {}) for f in films])


@pytest.fixture
def bench(tmp_path, backend):
    made = Bench(tmp_path, backend=backend)
    yield made
    made.catalog.close()


@pytest.fixture(scope="module")
def ray_bench(tmp_path_factory, postgres, s3):
    """Ray's workers, which reach a bucket by the environment, and a catalog that hosts share."""
    backend = f"postgresql+psycopg:{postgres.new_database()}", "s3://films/ray"
    made = Bench(tmp_path_factory.mktemp("ray"), lambda settings: RayExecutor(settings, None, 2), backend)
    yield made
    made.executor.close()
    made.catalog.close()


def test_films_become_artifacts(bench):
    report = bench.count("a", "b film")
    doubled = bench.double(report)
    assert sorted(doubled.done) == ["a", "b film"]
    artifact = doubled.done["a"]
    assert artifact.counts == {"ok": 10}
    assert artifact.inputs == (report.done["a"].id,)
    assert [r["value"] for r in read_rows(bench.store, artifact.tables)] == [2 * i for i in range(10)]


def test_one_bad_film_never_takes_others_with_it(bench):
    report = bench.count("a", "bad", "half", "b")
    assert sorted(report.done) == ["a", "b"]
    assert report.failed == {
        "bad": "film bad is no film: replace it",
        "half": "film half is truncated: fetch it again",
    }
    assert {a.subject for a in bench.catalog.artifacts()} == {"a", "b"}
    assert all(not row["result"]["retryable"] for row in bench.catalog.failures())


def test_parts_are_units_and_finished_units_are_not_done_again(bench):
    counted = bench.count("a", rows=600)
    assert [f.rows for f in counted.done["a"].tables] == [256, 256, 88]
    work = Work(DOUBLE, DoubleConfig(), "a", {"count": [counted.done["a"]]}, {})
    bench.double(counted)
    artifact = bench.catalog.current("double", "a")
    assert [f.name for f in artifact.tables] == [
        "part-00000-00000.parquet",
        "part-00000-00001.parquet",
        "part-00000-00002.parquet",
    ]
    assert artifact.fingerprint == work.recipe.fingerprint


def test_interrupted_run_resumes_at_missing_units(bench, tmp_path):
    counted = bench.count("a", "b")
    works = [
        Work(DOUBLE, DoubleConfig(mode=m), f, {"count": [counted.done[f]]}, {})
        for f, m in (("a", "right"), ("b", "interrupt"))
    ]
    with pytest.raises(KeyboardInterrupt):
        bench.run(works)
    assert bench.catalog.current("double", "a") is not None
    assert bench.catalog.current("double", "b") is None


def test_skips_are_kept_with_reasons(bench):
    artifact = bench.double(bench.count("a"), mode="skip").done["a"]
    assert artifact.counts == {"ok": 5, "skip:odd": 5}
    rejects = [f for f in artifact.files if f.name.startswith("rejects-")]
    assert [r["reason"] for r in read_rows(bench.store, rejects)] == ["odd"] * 5
    assert rejects[0] not in artifact.results


def test_a_failed_item_is_kept_and_others_go_on(bench):
    artifact = bench.double(bench.count("a"), mode="fail_one").done["a"]
    assert artifact.counts == {"ok": 9, "fail": 1}


def test_an_item_that_may_work_another_time_holds_its_film_back_and_is_not_lost(bench, tmp_path):
    report = bench.double(bench.count("a"), mode="retry_once", marker=str(tmp_path / "seen"))
    assert "1 of 10 items are to be tried again, such as 0: frame 0 came at a bad time" in report.failed["a"]
    assert all(row["result"]["retryable"] for row in bench.catalog.failures())
    again = bench.double(bench.count("a"), mode="retry_once", marker=str(tmp_path / "seen")).done["a"]
    assert again.counts == {"ok": 10}


@pytest.mark.parametrize(
    ("mode", "message"), [("forget", "no outcome for 1 items"), ("twice", "outcome for item 0 twice")]
)
def test_outcomes_that_are_lost_or_doubled_are_errors(bench, mode, message):
    report = bench.double(bench.count("a"), mode=mode)
    assert message in report.failed["a"]
    assert bench.catalog.current("double", "a") is None


def test_neutral_settings_stay_out_of_the_fingerprint(bench):
    source = ({"film_id": "a"}, "d")
    prints = {Work(COUNT, CountConfig(batch=b), "a", {}, {}, source).recipe.fingerprint for b in (1, 2)}
    assert len(prints) == 1


def test_job_resumes_from_its_scratch(bench):
    counted = bench.double(bench.count("a", "b", "c"))
    inputs = {"double": list(counted.done.values())}
    work = Work(TOTAL, TotalConfig(stop_at=1), "all", inputs, {})
    assert "stopped on purpose" in bench.run([work]).failed["all"]
    artifact = bench.run([work]).done["all"]
    assert artifact.summary == {"total": 270, "resumed": 1}
    assert json.loads(bench.store.path(artifact.file("total.json")).read_text()) == {"total": 270}


def at_once(report):
    return {subject: artifact.summary["at_once"] for subject, artifact in report.done.items()}


def test_a_job_takes_several_subjects_at_once_and_each_has_its_own_artifact(bench):
    report = bench.tell("a", "b", "c", "d")
    assert at_once(report) == {"a": 3, "b": 3, "c": 3, "d": 1}
    for subject, artifact in report.done.items():
        assert bench.store.path(artifact.file("told.txt")).read_text() == subject
    assert at_once(bench.tell("e", "f", at_once=1)) == {"e": 1, "f": 1}


def test_one_of_several_subjects_fails_alone(bench):
    report = bench.tell("a", "wrong", "c")
    assert at_once(report) == {"a": 3, "c": 3}
    assert report.failed == {"wrong": "film wrong cannot be told"}


def test_subjects_that_fail_together_are_computed_one_by_one(bench, caplog):
    assert at_once(bench.tell("a", "too many", "c")) == {"a": 1, "too many": 1, "c": 1}
    assert "tell of 3 subjects at once, now one by one" in caplog.text


def test_same_work_gives_the_same_digests(tmp_path):
    digests = []
    for run in "ab":
        bench = Bench(tmp_path / run)
        digests.append(bench.double(bench.count("a")).done["a"].digest)
        bench.catalog.close()
    assert digests[0] == digests[1]


def test_two_ingestions_of_the_same_films_at_once_keep_one_result(bench, backend, tmp_path):
    other = Bench(tmp_path / "other", backend=backend)
    films = [f"film {number}" for number in range(8)]

    def ingest(which):
        return which.double(which.count(*films, rows=300))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ingest, (bench, other))
    assert sorted(first.done) == sorted(second.done) == films
    assert first.failed == second.failed == {}
    assert {a.id for a in first.done.values()} == {a.id for a in second.done.values()}
    assert len(bench.catalog.artifacts()) == 16
    for artifact in bench.catalog.artifacts():
        assert len(artifact.inputs) == (artifact.kind == "double")
        for stored in artifact.files:
            bench.store.verify(stored)
    assert bench.catalog.unit_keys() == set()
    assert find_loose_objects(bench.catalog, bench.store) == []
    other.catalog.close()


def test_ray_gives_the_same_digests_as_inline(bench, ray_bench):
    inline = bench.double(bench.count("a", "b", rows=600))
    remote = ray_bench.double(ray_bench.count("a", "b", rows=600))
    assert {s: a.digest for s, a in inline.done.items()} == {s: a.digest for s, a in remote.done.items()}


def test_ray_tries_a_dead_workers_unit_again(ray_bench, tmp_path):
    report = ray_bench.double(ray_bench.count("once"), mode="die_once", marker=str(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert list(report.done) == ["once"]


def test_ray_gives_a_unit_up_after_three_deaths(ray_bench):
    counted = ray_bench.count("dies", "lives")
    works = [
        Work(DOUBLE, DoubleConfig(mode=m), f, {"count": [counted.done[f]]}, {})
        for f, m in (("dies", "die"), ("lives", "slow"))
    ]
    report = ray_bench.run(works)
    assert "killed its worker" in report.failed["dies"]
    assert list(report.done) == ["lives"]


def test_ray_shares_subjects_out_over_its_workers(ray_bench):
    assert at_once(ray_bench.tell("1", "2", "3", "4", at_once=9)) == {"1": 2, "2": 2, "3": 2, "4": 2}


def test_ray_tries_the_subjects_of_a_dead_worker_one_by_one(ray_bench):
    report = ray_bench.tell("before", "dies", "after", "another")
    assert at_once(report) == {"before": 1, "after": 2, "another": 2}
    assert "killed its worker" in report.failed["dies"]


def test_ray_stops_a_unit_that_hangs(ray_bench):
    counted = ray_bench.count("hangs", "goes on")
    works = [
        Work(DOUBLE, DoubleConfig(mode=m, time_limit_s=2.0), f, {"count": [counted.done[f]]}, {})
        for f, m in (("hangs", "hang"), ("goes on", "right"))
    ]
    report = ray_bench.run(works)
    assert "took longer than its time limit (double.time_limit_s=2)" in report.failed["hangs"]
    assert list(report.done) == ["goes on"]


def test_a_worker_that_comes_back_late_stores_nothing(ray_bench):
    import ray

    counted = ray_bench.count("late")
    work = Work(DOUBLE, DoubleConfig(mode="slow"), "late", {"count": [counted.done["late"]]}, {})
    (unit,) = ray_bench.engine.plan_units(work)
    before = ray_bench.store.keys()
    board = ray.remote(Board).options(num_cpus=0).remote()
    worker = ray.remote(RemoteWorker).options(num_cpus=0).remote(ray_bench.settings, board)
    late = worker.run.remote(DOUBLE, work.config, [unit], "first try")
    board.revoke.remote("first try")
    assert "was given to another worker meanwhile" in ray.get(late)[0].error
    assert ray_bench.store.keys() == before
    assert ray.get(worker.run.remote(DOUBLE, work.config, [unit], "second try"))[0].error is None


def test_items_whose_own_inputs_did_not_change_are_not_computed_again(bench, tmp_path):
    marker = tmp_path / "computed"
    config = {"mode": "note", "marker": str(marker)}
    bench.double(bench.count("a", rows=300), **config)
    marker.unlink()
    report = bench.double(bench.count("a", rows=303), **config)
    assert marker.read_text().split() == ["9000", "9030", "9060"]
    assert (report.reused, report.counts["ok"]) == (300, 303)
    assert "300 of 303 items reused" in report.line()
    artifact = report.done["a"]
    assert [r["value"] for r in read_rows(bench.store, artifact.tables)] == [2 * i for i in range(303)]
    marker.unlink()
    assert bench.double(bench.count("a", rows=304), mode="right").reused == 0, "another setting, other results"


def test_reused_rejects_and_results_give_the_same_bytes_as_a_whole_computation(tmp_path):
    digests = []
    for run, earlier in (("with", 20), ("without", None)):
        bench = Bench(tmp_path / run)
        if earlier:
            bench.double(bench.count("a", rows=earlier), mode="skip")
        report = bench.double(bench.count("a", rows=26), mode="skip")
        assert (report.reused, report.counts) == (earlier or 0, {"ok": 13, "skip:odd": 13})
        digests.append(report.done["a"].digest)
        bench.catalog.close()
    assert digests[0] == digests[1]


def test_ray_shows_progress_of_a_running_unit(ray_bench):
    counted = ray_bench.count("slow")
    seen = []
    work = Work(DOUBLE, DoubleConfig(mode="slow"), "slow", {"count": [counted.done["slow"]]}, {})
    ray_bench.engine.run([work], lambda done, total, message: seen.append(done))
    assert any(0 < done < 10 for done in seen)
