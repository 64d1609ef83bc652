"""Captions by a vision-language model and scripts by a language model, asked over a socket."""

import base64
import json
import re
from typing import Any

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from models.script import FrameScript
from stages.captions import SPEC as CAPTIONS
from stages.captions import Captions, CaptionsConfig
from stages.errors import ComputationError, UsageError
from stages.scripts import SPEC as SCRIPTS
from stages.scripts import Scripts, ScriptsConfig
from stages.spec import Fail, Ok, Row
from tests.chat_server import NAME, ScriptedServer, completion, run_chat_server
from tests.stages.test_captions import HEIGHT, WIDTH, face, identity, keyframe, person
from tests.tiny_checkpoints import save_clip, save_qwen3_vl

COLORS = {"red": (200, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 200), "yellow": (240, 220, 20),
          "white": (250, 250, 250), "black": (5, 5, 5), "gray": (127, 127, 127)}  # fmt: skip


def colored(frame_index: int, color: str, **changes: Any) -> Row:
    image = np.full((HEIGHT, WIDTH, 3), COLORS[color][::-1], np.uint8)
    return keyframe(frame_index, jpeg=cv2.imencode(".jpg", image)[1].tobytes(), time_s=0.0, shot_index=0, **changes)


def pictures_of(body: dict[str, Any]) -> list[np.ndarray]:
    urls = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    return [cv2.imdecode(np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8), 1) for url in urls]


def ids_of(body: dict[str, Any]) -> list[str]:
    return body["response_format"]["json_schema"]["schema"]["required"]


def name_color(picture: np.ndarray) -> str:
    middle = picture[picture.shape[0] // 2, picture.shape[1] // 2, ::-1].astype(int)
    return min(COLORS, key=lambda name: np.abs(middle - COLORS[name]).sum())


def see(body: dict[str, Any]) -> Any:
    """A model that sees colours: "A red thing." under the picture's id."""
    seen = [f"A {name_color(picture)} thing." for picture in pictures_of(body)]
    return completion(json.dumps({i: [text] for i, text in zip(ids_of(body), seen, strict=True)}))


@pytest.fixture
def config(tmp_path):
    def make(url: str, **changes: Any) -> CaptionsConfig:
        options = {"captioner": "vlm", "model": NAME, "endpoint_url": url, "attempts": 1, "max_tokens": 400}
        return CaptionsConfig(**{**options, "answers": tmp_path / "answers.sqlite", **changes})

    return make


def caption(config: CaptionsConfig, keyframes: list[Row], **inputs: list[Row]) -> list[Any]:
    return list(Captions(config)(**({"keyframes": keyframes, "people": [], "faces": [], "identities": []} | inputs)))


FRAMES = [colored(30 * i, color) for i, color in enumerate(["red", "green", "blue", "yellow", "white", "black"])]


@pytest.mark.parametrize("pictures", [1, 4])
def test_each_caption_stands_beside_its_own_keyframe_and_person(config, pictures):
    people = [person(30, 1, 100), person(30, 0, 10)]
    faces, identities = [face(30, 0, 0, 10)], [identity(30, 0, 2)]
    with ScriptedServer(see) as server:
        asked = config(server.url, pictures_per_request=pictures)
        outcomes = caption(asked, FRAMES, people=people, faces=faces, identities=identities)
    assert [outcome.item for outcome in outcomes] == ["0", "30", "60", "90", "120", "150"]
    rows = [row for outcome in outcomes for row in outcome.rows]
    assert [row["sentences"] for row in rows if row["target"] == "keyframe"] == [
        [f"A {color} thing."] for color in ("red", "green", "blue", "yellow", "white", "black")
    ]
    persons = [row for row in rows if row["target"] == "person"]
    assert [(r["frame_index"], r["person_index"], r["character_index"]) for r in persons] == [(30, 1, None), (30, 0, 2)]
    assert {row["captioner"] for row in rows} == {f"vlm {NAME}"}
    assert {name for row in rows for name in row} == set(CAPTIONS.schema.names)
    asked_about = sum(len(ids_of(body)) for body in server.seen)
    plain = {1: 2, 4: 3}[pictures]  # one for each kind, or for each question with several pictures
    assert asked_about == len(FRAMES) + len(people) + plain


def test_a_person_is_shown_without_what_is_around(config):
    shown = []

    def look(body: dict[str, Any]) -> Any:
        shown.extend(pictures_of(body))
        return see(body)

    mask = np.zeros((91, 41), np.uint8)
    mask[40:50, 15:25] = 255
    masked = person(30, 0, 10, mask_png=cv2.imencode(".png", mask)[1].tobytes())
    with ScriptedServer(look) as server:
        caption(config(server.url, sentinels=0), [colored(30, "red")], people=[masked])
    cut = next(picture for picture in shown if picture.shape[:2] == (91, 41))
    assert np.abs(cut[5, 5].astype(int) - 127).max() < 8
    assert name_color(cut[40:50, 15:25]) == "red"


def test_a_model_that_mixes_up_its_pictures_is_found_and_nothing_is_kept(config):
    def shifted(body: dict[str, Any]) -> Any:
        seen = [f"A {name_color(picture)} thing." for picture in pictures_of(body)]
        return completion(json.dumps({i: [text] for i, text in zip(ids_of(body), seen[1:] + seen[:1], strict=True)}))

    with (
        ScriptedServer(shifted) as server,
        pytest.raises(ComputationError, match=r"all \w+ was described as .*none is"),
    ):
        caption(config(server.url, pictures_per_request=7), FRAMES)


def test_after_a_mix_up_everything_is_asked_for_anew(config):
    """Answers beside the wrong pictures are not kept: the endpoint may be mended, and the requests the same."""
    mended = False

    def respond(body: dict[str, Any]) -> Any:
        seen = [f"A {name_color(picture)} thing." for picture in pictures_of(body)]
        told = seen if mended else seen[1:] + seen[:1]
        return completion(json.dumps({i: [text] for i, text in zip(ids_of(body), told, strict=True)}))

    with ScriptedServer(respond) as server:
        asked = config(server.url, pictures_per_request=3)
        with pytest.raises(ComputationError):
            caption(asked, FRAMES)
        mended = True
        assert all(isinstance(outcome, Ok) for outcome in caption(asked, FRAMES))


def test_half_of_a_letter_fails_its_keyframe_alone(config):
    def odd(body: dict[str, Any]) -> Any:
        if name_color(pictures_of(body)[0]) != "green":
            return see(body)
        return completion(json.dumps({ids_of(body)[0]: ["A smile \ud83d."]}))

    with ScriptedServer(odd) as server:
        outcomes = caption(config(server.url, sentinels=0), FRAMES)
    assert [type(outcome) for outcome in outcomes] == [Ok, Fail, Ok, Ok, Ok, Ok]


def test_a_word_that_holds_a_colours_name_is_not_that_colour(config):
    def vague(body: dict[str, Any]) -> Any:
        return completion(
            json.dumps({i: ["Coloured, reddish, greenish, whitened, blacked, bluish."] for i in ids_of(body)})
        )

    with ScriptedServer(vague) as server, pytest.raises(ComputationError, match="was described as"):
        caption(config(server.url), FRAMES)


def test_answers_that_were_exchanged_on_their_way_are_found(config):
    kept: list[Any] = []

    def late(body: dict[str, Any]) -> Any:
        kept.append(see(body))
        return kept[max(0, len(kept) - 2)]  # each request gets the answer of the one before

    with ScriptedServer(late) as server:
        outcomes = caption(config(server.url, sentinels=0, concurrency=1), FRAMES)
    assert any(isinstance(outcome, Fail) for outcome in outcomes)
    for outcome, color in zip(outcomes, ("red", "green", "blue", "yellow", "white", "black"), strict=True):
        if isinstance(outcome, Ok):
            assert next(iter(outcome.rows))["sentences"] == [f"A {color} thing."]
        else:
            assert "it tells of the pictures" in outcome.error and not outcome.retryable


def test_an_answer_that_cannot_be_used_is_mended_once(config):
    def careless(body: dict[str, Any]) -> Any:
        text = body["messages"][-1]["content"][-1]["text"]
        return see(body) if "It cannot be used: it is not JSON" in text else completion("I see a red thing.")

    with ScriptedServer(careless) as server:
        outcomes = caption(config(server.url), FRAMES)
    assert all(isinstance(outcome, Ok) for outcome in outcomes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("[]", "is a JSON list"), ('{"x": ["A."]}', "it tells of the pictures x, asked were"),
     ("{ID: [1]}", "no list of sentences"), ("{ID: ['  ']}", "it says nothing of")],
)  # fmt: skip
def test_nonsense_fails_its_keyframe_alone_and_says_why(config, text, problem):
    def nonsense(body: dict[str, Any]) -> Any:
        if name_color(pictures_of(body)[0]) != "green":
            return see(body)
        return completion(text.replace("ID", f'"{ids_of(body)[0]}"').replace("'", '"'))

    with ScriptedServer(nonsense) as server:
        outcomes = caption(config(server.url, sentinels=0), FRAMES)
    assert [type(outcome) for outcome in outcomes] == [Ok, Fail, Ok, Ok, Ok, Ok]
    assert "keyframe 30" in outcomes[1].error and problem in outcomes[1].error


def test_a_server_that_is_away_leaves_the_keyframes_for_later(config):
    outcomes = caption(config("http://127.0.0.1:9/v1"), FRAMES[:2])
    assert all(isinstance(outcome, Fail) and outcome.retryable for outcome in outcomes)


def test_a_keyframe_that_cannot_be_read_fails_alone(config):
    with ScriptedServer(see) as server:
        first, second = caption(config(server.url), [keyframe(0, jpeg=b"no"), FRAMES[1]])
    assert isinstance(first, Fail) and "cannot be decoded" in first.error
    assert isinstance(second, Ok)


def test_rules_keep_their_recipe_and_a_models_words_are_part_of_its():
    assert set(CaptionsConfig().recipe()) == {"captioner", "max_sentences", "max_person_sentences"}
    one = CaptionsConfig(captioner="vlm", model="a", endpoint_url="http://x/v1")
    assert one.recipe() == one.model_copy(update={"endpoint_url": "http://y/v1", "concurrency": 3}).recipe()
    assert one.recipe()["prompts"].startswith("1 ")
    assert one.recipe() != one.model_copy(update={"model": "b"}).recipe()


def test_a_model_that_runs_here_enters_the_recipe_by_what_it_holds():
    here, there = (CaptionsConfig(captioner="vlm", model=place) for place in ("/a/model", "/b/model"))
    assert here.recipe() == there.recipe()
    assert (here.weights(), CaptionsConfig().weights()) == (("/a/model",), ())
    assert CaptionsConfig(captioner="vlm", model="a", endpoint_url="http://x/v1").weights() == ()


def test_other_prompts_are_another_recipe_and_absent_ones_are_named(tmp_path):
    for name in ("system", "keyframe", "person", "repair"):
        (tmp_path / f"{name}.txt").write_text("Say {count} {ids} {sentences}.")
    options = {"captioner": "vlm", "model": "a"}
    own = CaptionsConfig(**options, prompts=str(tmp_path)).recipe()["prompts"]
    (tmp_path / "person.txt").write_text("Say.")
    assert CaptionsConfig(**options, prompts=str(tmp_path)).recipe()["prompts"] != own
    with pytest.raises(UsageError, match="no prompts '7'.*expected 1, or a folder with system.txt"):
        CaptionsConfig(**options, prompts="7").recipe()


@pytest.mark.parametrize("settings", [{"captioner": "vlm"}, {"captioner": "vlm", "endpoint_url": "http://x/v1"}])
def test_a_model_has_to_be_named(settings):
    with pytest.raises(ValidationError, match="`model` names none: set it"):
        CaptionsConfig(**settings)


# Scripts


def captions_of(frame_index: int) -> list[Row]:
    rows = [("keyframe", None, None, ["A street in daylight.", "Two people walk to the left."])]
    rows += [
        ("person", 0, 3, ["A woman in a red coat.", "She holds an umbrella."]),
        ("person", 1, None, ["A tall man."]),
    ]
    names = ("target", "person_index", "character_index", "sentences")
    return [
        {"film_id": "film", "frame_index": frame_index, **dict(zip(names, row, strict=True)), "captioner": "x"}
        for row in rows
    ]


def step_of(body: dict[str, Any]) -> str:
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    return "fuse" if "description" in properties else "script" if "characters" in properties else "extract"


SCRIPT = {
    "characters": [
        {"identity": "Unidentified person", "description": [{"text": "A tall man.", "captions": [5]}]},
        {"identity": "Person 4", "description": [{"text": "She wears a red coat.", "captions": [3]}]},
    ],
    "scene_elements": [{"text": "A daylight street.", "captions": [1]}],
    "plot": [
        {"text": "Two people walk left.", "captions": [2]},
        {"text": "They run from a burning ship.", "captions": [2]},
    ],
}


def write(body: dict[str, Any], script: Any = SCRIPT) -> Any:
    answers = {"fuse": {"description": "A woman and a man."}, "script": script}
    answers["extract"] = {"scene_elements": ["A street."], "plot": ["They walk."]}
    return completion(json.dumps(answers[step_of(body)]))


@pytest.fixture
def writer(tmp_path):
    def make(url: str, **changes: Any) -> ScriptsConfig:
        options = {"fuser": "llm", "model": NAME, "endpoint_url": url, "attempts": 1, "max_tokens": 600}
        return ScriptsConfig(**{**options, "answers": tmp_path / "answers.sqlite", **changes})

    return make


def script(config: ScriptsConfig, *frames: int) -> list[Any]:
    keyframes = [colored(frame, "red") for frame in frames]
    return list(Scripts(config)(keyframes=keyframes, captions=[row for frame in frames for row in captions_of(frame)]))


def test_a_script_is_written_in_three_steps_and_its_sentences_go_back_to_captions(writer):
    with ScriptedServer(write) as server:
        (outcome,) = script(writer(server.url), 0)
    assert [step_of(body) for body in server.seen] == ["fuse", "extract", "script"]
    (row,) = outcome.rows
    assert set(row) == set(SCRIPTS.schema.names)
    found = FrameScript.model_validate_json(row["script"])
    assert [(c.identity, c.character_index) for c in found.characters] == [
        ("Person 4", 3),
        ("Unidentified person", None),
    ]
    assert found.sentences() == ["She wears a red coat.", "A tall man.", "A daylight street.", "Two people walk left.",
                                 "They run from a burning ship."]  # fmt: skip
    assert row["captions"] == [[3], [5], [1], [2], [2]]
    assert row["untraced"] == 1, "nobody spoke of a ship"
    fused = server.seen[0]["messages"][-1]["content"]
    assert "[3] (Person 4) A woman in a red coat." in fused and "[1] (frame) A street in daylight." in fused
    assert "They walk." in server.seen[2]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"characters": []}, "its characters are none, expected Person 4, Unidentified person"),
        ({"plot": [{"text": "A.", "captions": [9]}]}, "names caption 9, there are 5"),
        ({"plot": [{"text": f"A {i}.", "captions": []} for i in range(20)]}, "it has 23 sentences, expected 1 to 15"),
        ({"plot": None}, "plot: Input should be a valid list"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
    ],
)
def test_a_script_that_cannot_be_used_is_mended_once_else_fails_alone(writer, change, problem):
    def write_badly(body: dict[str, Any]) -> Any:
        mended = "It cannot be used" in body["messages"][-1]["content"]
        return write(body, SCRIPT if mended and forgiving else SCRIPT | change)

    forgiving = True
    with ScriptedServer(write_badly) as server:
        (mended,) = script(writer(server.url), 0)
        assert isinstance(mended, Ok)
        assert problem in server.seen[-1]["messages"][-1]["content"]
        forgiving = False
        (failed,) = script(writer(server.url, model="another"), 0)
    assert isinstance(failed, Fail) and problem in failed.error and "keyframe 0" in failed.error


def test_a_resumed_unit_asks_only_for_what_it_has_no_answer_to(writer):
    with ScriptedServer(write) as server:
        script(writer(server.url), 0)
        asked = len(server.seen)
        script(writer(server.url), 0)
        assert len(server.seen) == asked


def test_rules_trace_every_sentence():
    (outcome,) = list(Scripts(ScriptsConfig())(keyframes=[colored(0, "red")], captions=captions_of(0)))
    (row,) = outcome.rows
    said = [sentence for caption in captions_of(0) for sentence in caption["sentences"]]
    sentences = FrameScript.model_validate_json(row["script"]).sentences()
    assert [said[numbers[0] - 1] for numbers in row["captions"]] == sentences
    assert row["untraced"] == 0


def test_a_model_from_a_folder_is_asked_in_this_process(config, tmp_path):
    folder = save_qwen3_vl(tmp_path / "a model")
    asked = config(None, model=str(folder), endpoint_url=None, max_tokens=16)
    (outcome,) = caption(asked, FRAMES[:1])
    assert isinstance(outcome, Fail), "a random model writes no JSON"
    assert re.search("cut off after|answered twice what cannot be used", outcome.error)


class ColorSpace:
    """In the place of CLIP: pictures and texts as their colour's own direction."""

    def embed_pictures(self, pictures: list[np.ndarray]) -> np.ndarray:
        return self.embed_texts([name_color(picture[:, :, ::-1]) for picture in pictures])

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        return np.float32([[color in text for color in COLORS] for text in texts])


def test_captions_that_do_not_fit_their_keyframes_are_not_kept(config, tmp_path):
    frames = [colored(30 * i, color) for i, color in enumerate([*COLORS, *COLORS])]
    checked = {"sentinels": 0, "check_weights": str(save_clip(tmp_path / "clip"))}
    turned = [*COLORS][1:] + [*COLORS][:1]

    def wrong(body: dict[str, Any]) -> Any:
        status, headers, text = see(body)
        for color, other in zip(COLORS, turned, strict=True):
            text = text.replace(f"A {color} thing", f"A {other.upper()} thing")
        return status, headers, text.lower().replace("a ", "A ")

    for respond, kept in ((see, True), (wrong, False)):
        with ScriptedServer(respond) as server:
            asked = config(server.url, answers=tmp_path / f"{kept}.sqlite", **checked)
            assert asked.weights() == (str(tmp_path / "clip"),)
            stage = Captions(asked)
            assert stage._clip.embed_texts(["A thing."]).shape == (1, 16)
            stage._clip = ColorSpace()
            inputs = {"keyframes": frames, "people": [], "faces": [], "identities": []}
            if kept:
                assert [outcome for outcome in stage(**inputs) if not isinstance(outcome, Ok)] == []
            else:
                with pytest.raises(
                    ComputationError, match="captions of film: captions fit their own pictures no better"
                ):
                    list(stage(**inputs))


def test_a_real_model_captions_by_its_schema(config, tmp_path):
    """The model is random, so that what it says is noise; that it stands where it belongs is not."""
    with run_chat_server(tmp_path) as url:
        (outcome,) = caption(config(url, sentinels=0, max_tokens=2000, max_sentences=2), FRAMES[:1])
    if isinstance(outcome, Ok):
        (row,) = outcome.rows
        assert 1 <= len(row["sentences"]) <= 2
    else:
        assert re.search("cut off after|answered twice", outcome.error)
