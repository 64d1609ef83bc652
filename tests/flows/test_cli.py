import json

import pytest
from click.testing import CliRunner

from flows import cli


def call(monkeypatch, capsys, *arguments):
    """Run `main` as the shell does; returns exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["moviedreamer", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["run", "nowhere.mp4"], "no such film: 'nowhere.mp4'"),
        (["ingest", "--profile", "none", "x.mp4"], "no profile 'none'"),
        (["train", "--set", "people.x=1"], "people.x: unknown setting"),
        (["artifacts", "show", "x-1"], "no artifact 'x-1'"),
        (["weights", "pull", "nothing"], "weights 'nothing' are unknown"),
        (["frobnicate"], "No such command"),
        (["plan", "--select", "peple"], "no stage 'peple' to select"),
        (["plan", "--films", "x*"], "no film of the workspace matches 'x*'"),
        (["backfill", "--reprocess", "some"], "'some' is not one of"),
        (["quarantine", "show", "x"], "nothing of 'x' is in quarantine"),
        (["artifacts", "why", "x-1"], "no artifact 'x-1'"),
        (["snapshot", "create", "newest"], "a snapshot cannot be called 'newest'"),
        (["snapshot", "diff", "a", "b"], "no snapshot 'a'"),
        (["train", "--snapshot", "a"], "no snapshot 'a'"),
        (["generate"], "Missing argument"),
        (["generate", "story.json", "--model", "m"], "no model 'm'"),
        (["models", "promote", "m"], "no model 'm'"),
        (["film", "remove", "x.mp4", "--yes"], "no film 'x.mp4'"),
        (["stage", "replay", "people"], "expected STAGE/SUBJECT"),
        (["plan", "--set", "engine.metrics_address=here"], "engine.metrics_address"),
    ],
)
def test_wrong_calls_say_what_is_wrong(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    cli.open_workspace(tmp_path / "workspace").catalog.close()
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    [
        ["status"], ["report"], ["artifacts", "list"], ["artifacts", "gc"], ["quarantine", "list"],
        ["snapshot", "list"], ["models", "list"], ["film", "remove", "x"], ["stage", "replay", "people/x"],
    ],
)  # fmt: skip
def test_a_slip_of_the_pen_makes_no_workspace(monkeypatch, capsys, tmp_path, command):
    code, _, err = call(monkeypatch, capsys, *command, "--workspace", tmp_path / "wrkspace")
    assert (code, (tmp_path / "wrkspace").exists()) == (2, False)
    assert "no workspace at" in err


def test_a_plan_of_nothing_is_empty(monkeypatch, capsys, tmp_path):
    code, out, _ = call(monkeypatch, capsys, "plan", "--json", "--workspace", tmp_path)
    assert (code, json.loads(out)["total"]["seconds"]) == (0, 0.0)
    assert call(monkeypatch, capsys, "plan", "--workspace", tmp_path)[0] == 0


@pytest.mark.parametrize("command", ["train", "retrain", "evaluate"])
def test_commands_that_come_too_early_name_the_first_step(monkeypatch, capsys, tmp_path, command):
    code, _, err = call(monkeypatch, capsys, command, "--workspace", tmp_path / "w")
    assert code == 1
    assert "run `moviedreamer ingest FILM...` first" in err


@pytest.mark.parametrize(
    ("story", "message"),
    [("{", "line 1"), ('{"title": "x", "frames": [], "colour": 1}', "colour"), (None, "story.json")],
)
def test_bad_stories(monkeypatch, capsys, tmp_path, story, message):
    path = tmp_path / "story.json"
    if story:
        path.write_text(story)
    opened = cli.open_workspace(tmp_path / "w")
    opened.catalog.save_snapshot("s", ["shards-1"])
    opened.catalog.set_ref("snapshot/newest", "s")
    code, _, err = call(monkeypatch, capsys, "generate", path, "--workspace", tmp_path / "w")
    assert code == 2
    assert message in err


def test_missing_weights_are_found_before_anything_starts(monkeypatch, capsys, tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"x")
    settings = ("--set", f"engine.weights_dir={tmp_path}/none")
    code, _, err = call(monkeypatch, capsys, "ingest", film, "--workspace", tmp_path / "w", *settings)
    assert code == 1
    assert "moviedreamer weights pull" in err


def test_tables_are_json_for_machines():
    for command in (["profile", "show"], ["weights", "list"]):
        rows = json.loads(CliRunner().invoke(cli.cli, [*command, "--json"]).output)
        assert len(rows) > 5


def test_doctor_lists_what_is_missing(tmp_path):
    done = CliRunner().invoke(cli.cli, ["doctor", "--json", "--workspace", str(tmp_path)])
    rows = {row["check"]: row for row in json.loads(done.output)}
    assert rows["torch"]["ok"]
    assert rows["weights centerface"]["ok"]


def test_doctor_asks_a_shared_workspace(tmp_path, s3, monkeypatch):
    def examine():
        done = CliRunner().invoke(cli.cli, ["doctor", "--json", "--workspace", str(tmp_path)])
        return {row["check"]: row for row in json.loads(done.output)}["workspace"]

    assert (examine()["ok"], examine()["found"]) == (True, "none yet")
    (tmp_path / "workspace.yaml").write_text("objects: s3://films/doctor\n")
    assert examine()["found"] == "0 films, objects in s3://films/doctor"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "SignatureDoesNotMatch" in examine()["remedy"]
    (tmp_path / "workspace.yaml").write_text("catalog: postgresql+psycopg://me@127.0.0.1:9/x\n")
    assert "check that it runs" in examine()["remedy"]


def test_artifacts_of_an_empty_workspace(monkeypatch, capsys, tmp_path):
    cli.open_workspace(tmp_path).catalog.close()
    assert call(monkeypatch, capsys, "artifacts", "list", "--json", "--workspace", tmp_path)[:2] == (0, "[]\n")
    assert call(monkeypatch, capsys, "artifacts", "verify", "--workspace", tmp_path)[0] == 0


def test_verify_finds_a_damaged_object(monkeypatch, capsys, tmp_path):
    from tests.storage.test_catalog import make

    opened = cli.open_workspace(tmp_path)
    opened.catalog.commit(make())
    code, out, _ = call(monkeypatch, capsys, "artifacts", "verify", "--workspace", tmp_path)
    assert code == 1
    assert "is not in" in out
