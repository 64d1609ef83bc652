import dataclasses
import json

import pytest
from click.testing import CliRunner

from benchmarks import rates
from flows import cli
from flows.doctor import examine
from flows.needs import Footprints, examine_needs, measure_flops, rates_path, read_rates
from flows.profile import ExplainedProfile
from flows.stage_loads import stage_loads

FACES = ("faces.models.conditioning=farl", "tokenize.text_encoder=longclip_l")
STORY = (
    "train_autoregressive.trunk=llama2_7b",
    "train_autoregressive.layers=null",
    "train_autoregressive.window_frames=4",
    "train_autoregressive.batch_windows=4",
    "train_autoregressive.precision=bfloat16",
    "train_autoregressive.gradient_checkpointing=true",
    "score.window_frames=4",
    "dream.window_frames=6",
)
GIB = 2**30


@pytest.fixture(scope="module")
def footprints(tmp_path_factory):
    """Kept over the tests of this file."""
    return Footprints(tmp_path_factory.mktemp("cache") / "footprints.json")


def needs_of(footprints, *settings, keyframes=None, room=None, rates=(), speed=1e12):
    profile = ExplainedProfile("embedded", settings).profile
    found = examine_needs(profile, keyframes, room, footprints, dict(rates), lambda: speed)
    return {need.stage: need for need in found}


def stage_rows(rows):
    return {row["check"].removeprefix("stage "): row for row in rows if row["check"].startswith("stage ")}


def test_light_networks_are_not_asked_after(tmp_path):
    assert stage_loads(ExplainedProfile("embedded").profile) == []
    assert stage_rows(examine("embedded", tmp_path, keyframes=10, cache=tmp_path)) == {}
    assert list(tmp_path.iterdir()) == []


def test_each_stage_of_the_paper_profile_is_known():
    """With the stages that it has now: what it makes and what trains, in the order of the stages."""
    known = [stage.stage for stage in stage_loads(ExplainedProfile("paper").profile)]
    expected = ["people", "faces", "captions", "scripts", "features", "train_autoencoder", "tokenize",
                "train_renderer", "train_autoregressive", "score", "dream", "render"]  # fmt: skip
    assert [stage for stage in known if stage not in ("animate", "evaluate")] == expected
    assert stage_loads(ExplainedProfile("paper", ("captions.endpoint_url=http://x/v1",)).profile) != []
    endpoint = ExplainedProfile("paper", ("captions.endpoint_url=http://x/v1", "captions.model=x")).profile
    assert "captions" not in [stage.stage for stage in stage_loads(endpoint)]


def test_time_is_arithmetic_by_the_speed_of_this_machine(footprints):
    need = needs_of(footprints, *FACES, keyframes=3600, speed=2e9)["faces"]
    assert need.flops == pytest.approx(35.1e9, rel=0.01)  # twice FaRL's 17.6 G multiplications and additions
    assert need.hours == pytest.approx(need.flops / 2e9)
    assert not need.measured
    assert "at least 18 h for 3,600 keyframes" in need.describe()
    assert needs_of(footprints, *FACES)["faces"].hours is None


def test_time_follows_from_measured_rates_where_there_are_any(footprints):
    need = needs_of(footprints, *FACES, keyframes=3600, rates={"farl": 0.5})["faces"]
    assert (need.hours, need.measured) == (0.5, True)
    assert "0.5 h" in need.describe()
    assert "at least" not in need.describe()


def test_training_time_counts_steps_and_is_shared_by_processes(footprints):
    alone = needs_of(footprints, *STORY)["train_autoregressive"]
    settings = ("train_autoregressive.processes=4", "train_autoregressive.micro_batches=4")
    four = needs_of(footprints, *STORY, *settings)["train_autoregressive"]
    assert alone.units == four.units == 240
    assert alone.hours == pytest.approx(240 * alone.flops / 1e12 / 3600)
    assert four.hours == pytest.approx(alone.hours / 4, rel=0.01)
    assert alone.memory_bytes > 98 * GIB
    assert alone.memory_bytes / 4 < four.memory_bytes < alone.memory_bytes / 3


def test_what_does_not_fit_names_settings_that_do(footprints):
    tight = needs_of(footprints, *STORY, room=40 * GIB)
    remedy = tight["train_autoregressive"].remedy
    assert remedy.startswith("set train_autoregressive.processes=4 and train_autoregressive.micro_batches=4")
    settings = remedy.removeprefix("set ").split(" and ")
    better = needs_of(footprints, *STORY, *settings, room=40 * GIB)["train_autoregressive"]
    assert better.remedy == ""
    assert better.memory_bytes <= 40 * GIB
    assert tight["dream"].remedy == ""


def test_what_fits_on_no_shared_batch_asks_for_a_larger_one(footprints):
    single = (*(s for s in STORY if "batch_windows" not in s), "train_autoregressive.batch_windows=1")
    remedy = needs_of(footprints, *single, room=40 * GIB)["train_autoregressive"].remedy
    assert "at least 3 accelerators" in remedy or "at least 4 accelerators" in remedy
    assert "train_autoregressive.processes" in remedy
    hopeless = needs_of(footprints, *single, room=GIB)
    assert hopeless["train_autoregressive"].remedy.startswith("train it on accelerators with more memory")
    assert hopeless["dream"].remedy == "run it on an accelerator with more memory than 1 GiB"


def test_footprints_are_measured_once(tmp_path):
    lines = []
    first = stage_rows(examine("embedded", tmp_path, None, FACES, lines.append, tmp_path))
    assert lines == [f"measuring {name} on fake tensors" for name in ("farl", "longclip_l")]
    assert first["faces"]["needs"]["parameters"] == 86_192_640
    assert stage_rows(examine("embedded", tmp_path, None, FACES, lines.append, tmp_path)) == first
    assert len(lines) == 2
    (tmp_path / "footprints.json").write_text("{")  # cut off
    examine("embedded", tmp_path, None, FACES, lines.append, tmp_path)
    assert len(lines) == 4


def test_rates_of_the_benchmark_reach_doctor(tmp_path, capsys):
    """What `benchmarks/rates.py` measures under a network's name is what doctor takes for it."""
    result = rates.main(["--tiny", "--networks", "farl,longclip_l", "--repetitions", "1", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))
    rows = {row["network"]: row for row in result["networks"]}
    assert rows.keys() == {"farl", "longclip_l"}
    assert all(row["seconds_per_unit"] > 0 and row["peak_bytes"] is None for row in rows.values())
    path = rates.keep_rates("cpu", result["networks"], tmp_path)
    assert path == rates_path("cpu", tmp_path)
    assert read_rates("cpu", tmp_path) == {name: row["seconds_per_unit"] for name, row in rows.items()}
    rates.keep_rates("cpu", [rows["farl"] | {"seconds_per_unit": 7.0}, {"network": "sam2", "error": "x"}], tmp_path)
    assert read_rates("cpu", tmp_path) == {"farl": 7.0, "longclip_l": rows["longclip_l"]["seconds_per_unit"]}
    assert read_rates("another", tmp_path) == {}


def test_the_benchmark_describes_networks_without_running_them(capsys):
    (row,) = rates.main(["--fake", "--networks", "farl"])["networks"]
    assert row["parameters"] == 86_192_640
    captured = capsys.readouterr()
    assert "86,192,640 parameters" in captured.err
    assert json.loads(captured.out)["device"] == "fake"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--networks", "nothing"], "names none of: clip_vit_l14"), (["--device", "cpu"], "use --fake or --tiny")],
)
def test_the_benchmark_refuses_what_it_cannot_do(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        rates.main(arguments)
    assert expected in capsys.readouterr().err


def test_every_network_that_doctor_asks_for_can_be_timed():
    """Of the paper profile as it is, so that rates of one device tell its whole time."""
    timed = {case.workload.name for case in rates.choose_cases(tiny=False)}
    asked = {load.workload.name for s in stage_loads(ExplainedProfile("paper").profile) for load in s.loads}
    assert asked <= timed


def test_matrix_products_have_a_rate():
    assert 1e8 < measure_flops("cpu", seconds=0.0) < 1e15


def test_needs_are_plain_values(footprints):
    need = needs_of(footprints, *FACES, keyframes=1)["tokenize"]
    assert json.loads(json.dumps(dataclasses.asdict(need)))["networks"] == ["longclip_l"]


def test_keyframes_are_counted_from_one():
    done = CliRunner().invoke(cli.cli, ["doctor", "--keyframes", "0"])
    assert done.exit_code == 2
    assert "--keyframes" in done.output
