import subprocess
import sys

import pytest

from flows.profile import ExplainedProfile
from models.weights import TABLE
from stages.errors import ProfileError


def test_embedded_is_complete_and_explains_itself():
    explained = ExplainedProfile("embedded", ("people.max_people=3", "keyframes.every_n_frames=5"))
    assert explained.profile.people.max_people == 3
    rows = {row["setting"]: row for row in explained.rows()}
    assert rows["people.max_people"]["from"] == "--set"
    assert rows["shards.count"]["from"] == "embedded.yaml"
    assert rows["people.prompt"]["from"] == "default"


def test_a_profile_builds_on_another(tmp_path):
    path = tmp_path / "my profile.yaml"
    path.write_text("base: embedded\nname: mine\npeople:\n  max_people: 2\n")
    explained = ExplainedProfile(str(path))
    assert (explained.profile.name, explained.profile.people.max_people) == ("mine", 2)
    assert explained.origins["people.max_people"] == "my profile.yaml"


def test_nested_settings_can_be_set():
    explained = ExplainedProfile("embedded", ("train_autoencoder.film_phase.steps=7",))
    assert explained.profile.train_autoencoder.film_phase.steps == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("people.max_people=many", r"people.max_people: .*got 'many' \(from --set\)"),
        ("people.maximum=3", "people.maximum: unknown setting; `moviedreamer profile show` lists all"),
        ("persons.max_people=3", "persons: unknown setting"),
        ("people", "expected section.field=value"),
        ("people=3", "expected section.field=value"),
        ("people.max_people=[", "is not YAML"),
    ],
)
def test_wrong_overrides_name_the_field_and_the_remedy(override, message):
    with pytest.raises(ProfileError, match=message):
        ExplainedProfile("embedded", (override,))


def test_unknown_profile():
    with pytest.raises(ProfileError, match="no profile 'nothing': expected one of embedded"):
        ExplainedProfile("nothing")


@pytest.mark.parametrize(("text", "message"), [("- a\n", "holds a list"), ("a: [", "is not YAML")])
def test_broken_profile_files(tmp_path, text, message):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message):
        ExplainedProfile(str(path))


def test_planning_imports_nothing_heavy():
    heavy = ("torch", "transformers", "diffusers", "prefect", "ray", "cv2", "av", "scipy", "PIL")
    code = f"import flows.cli, flows.commands, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_papers_profile_names_weights_of_the_table() -> None:
    profile = ExplainedProfile("paper").profile
    assert {"grounding_dino", "sam2", "buffalo_l", "farl", "longclip_l", "llama2_7b"} <= set(profile.weights())
    assert set(profile.weights()) <= set(TABLE)
    assert profile.dream.face_models == profile.faces.models
