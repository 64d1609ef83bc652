"""Where weights are found, and what tells them apart."""

from pathlib import Path

import pytest

from models.weights import TABLE, WeightsError, identity, locate, missing_files


def folder(path: Path, content: bytes = b"abc") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(content + bytes(300_000) + content)
    (path / ".cache").mkdir()
    (path / ".cache" / "note").write_text(str(path))
    return path


def test_the_users_own_weights_are_told_by_what_they_hold_not_by_where_they_lie(tmp_path):
    one, copy, other = folder(tmp_path / "a b"), folder(tmp_path / "c"), folder(tmp_path / "d", b"abd")
    assert identity(str(one)) == identity(str(copy)) != identity(str(other))
    (copy / "more.json").write_text("{}")
    assert identity(str(one)) != identity(str(copy))
    assert identity(str(one / "config.json")) == identity(str(other / "config.json"))


def test_names_of_the_table_are_told_by_the_digests_of_their_files():
    assert identity("minilm_l6") == TABLE["minilm_l6"].identity(Path("anywhere"))
    assert locate("minilm_l6").name == "minilm_l6"


def test_absent_weights_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"no weights at .*nothing: expected a folder, or one of ssdlite_person"):
        identity(str(tmp_path / "nothing"))
    assert missing_files(str(tmp_path / "nothing")) == [tmp_path / "nothing"]
    assert missing_files(str(folder(tmp_path / "there"))) == []
    with pytest.raises(WeightsError, match="'nonsense' are unknown"):
        missing_files("nonsense")
