"""Chat models behind an endpoint: a real one, and one that is slow, busy, broken or closed."""

import json
import time
from typing import Any

import numpy as np
import pytest

from models.answers import AnswerBook
from models.chat import ChatError, ChatRequest
from models.chat_captioner import encode_jpeg
from models.chat_endpoint import Endpoint, EndpointModel
from tests.chat_server import NAME, ScriptedServer, completion, run_chat_server

SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


def picture(level: int) -> bytes:
    return encode_jpeg(np.full((40, 60, 3), level, np.uint8))


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with run_chat_server(tmp_path_factory.mktemp("chat")) as address:
        yield address


def model(url: str, book: AnswerBook, key: str | None = None, **changes: Any) -> EndpointModel:
    options = {"attempts": 2, "first_wait_s": 0.05, "timeout_s": 30.0} | changes
    return EndpointModel(Endpoint(url, NAME, **options), key, book, "the variable MY_KEY")


@pytest.fixture
def book(tmp_path):
    return AnswerBook(tmp_path / "a book" / "answers.sqlite")


def test_a_real_server_answers_pictures_by_a_schema_in_the_order_of_the_requests(url, book):
    requests = [ChatRequest(f"k{i}", "What is it?", "Answer.", (picture(i),), SCHEMA) for i in range(24)]
    answers = model(url, book).ask(requests)
    assert [answer.key for answer in answers] == [request.key for request in requests]
    for answer in answers:
        assert answer.error == ""
        assert json.loads(answer.text)["color"] in ("red", "blue")
    assert book.spent_today() > 24
    spent = book.spent_today()
    assert model("http://127.0.0.1:9/v1", book).ask(requests) == answers, "kept answers need no server"
    assert book.spent_today() == spent


def test_a_refused_key_stops_everything_and_is_named_but_not_shown(tmp_path, book):
    with run_chat_server(tmp_path, key="right-key") as url:
        request = ChatRequest("a", "Say something.", schema=SCHEMA)
        assert model(url, book, key="right-key").ask([request])[0].text
        with pytest.raises(ChatError, match=r"refused the key \(401.*set the variable MY_KEY") as caught:
            model(url, AnswerBook(tmp_path / "other"), key="wrong-key").ask([request] * 3)
        assert "wrong-key" not in str(caught.value)


def test_a_broken_picture_is_refused_and_the_others_are_answered(url, book):
    requests = [ChatRequest("bad", "What?", pictures=(b"no picture",), schema=SCHEMA)]
    requests += [ChatRequest("good", "What?", pictures=(picture(9),), schema=SCHEMA)]
    bad, good = model(url, book).ask(requests)
    assert bad.text is None and not bad.retryable and "refused the request (400)" in bad.error
    assert good.text


def test_an_answer_that_is_cut_off_says_how_to_get_all_of_it(url, book):
    (answer,) = model(url, book).ask([ChatRequest("a", "Say something.", schema=SCHEMA, max_tokens=3)])
    assert answer.text is None and "cut off after 3 tokens: raise max_tokens" in answer.error


def test_nobody_at_the_address_is_told_once_for_all(book):
    started = time.monotonic()
    answers = model("http://127.0.0.1:9/v1", book, concurrency=1).ask([ChatRequest(str(i), "?") for i in range(50)])
    assert all(a.text is None and a.retryable and "did not answer after 2 attempts" in a.error for a in answers)
    assert time.monotonic() - started < 5, "each request waited for itself"


def test_a_spent_budget_keeps_further_requests_back(url, book):
    requests = [ChatRequest(str(i), f"Question {i}.", schema=SCHEMA) for i in range(6)]
    answers = model(url, book, concurrency=1, daily_tokens=1).ask(requests)
    assert answers[0].text and all(a.text is None and a.retryable for a in answers[1:])
    assert "the budget of 1 tokens a day is spent: raise daily_tokens" in answers[1].error


def fickle(*turns, delay_s: float = 0.0) -> ScriptedServer:
    """A server that answers by a list; the last for ever."""
    left = list(turns)

    def respond(_: dict[str, Any]) -> Any:
        time.sleep(delay_s)
        return left.pop(0) if len(left) > 1 else left[0]

    return ScriptedServer(respond)


GOOD = completion("yes")


@pytest.mark.parametrize(
    "first",
    [(429, {"Retry-After": "0"}, ""), (503, {}, "busy"), (500, {}, ""), None, (200, {}, "<html>"),
     (200, {}, '{"choices": []}'), (200, {}, '{"choices": [{"message": {"content": null}}]}')],
)  # fmt: skip
def test_what_may_pass_is_tried_again(first, book):
    with fickle(first, GOOD) as server:
        (answer,) = model(server.url, book).ask([ChatRequest("a", "?")])
    assert answer.text == "yes" and len(server.seen) == 2


@pytest.mark.parametrize(
    ("turn", "text"),
    [((503, {}, ""), "status 503"), (None, "RemoteProtocolError"), ((200, {}, "no"), "no chat completion")],
)
def test_what_does_not_pass_is_an_error_that_may_be_tried_another_day(turn, text, book):
    with fickle(turn) as server:
        (answer,) = model(server.url, book).ask([ChatRequest("a", "?")])
    assert answer.text is None and answer.retryable and text in answer.error
    assert len(server.seen) == 2


def test_a_slow_server_is_given_up_after_the_time_limit(book):
    with fickle(GOOD, delay_s=0.6) as server:
        (answer,) = model(server.url, book, timeout_s=0.2, attempts=1).ask([ChatRequest("a", "?")])
    assert answer.text is None and answer.retryable and "no whole answer within 0.2 s" in answer.error


@pytest.mark.parametrize(
    ("turn", "problem"),
    [((404, {}, "{}"), "check endpoint_url and model"), ((402, {}, ""), "check credit"),
     ((307, {"Location": "http://x/"}, ""), "check endpoint_url"), ((400, {}, "Invalid API key"), "refused the key")],
)  # fmt: skip
def test_what_holds_for_all_requests_stops_everything(turn, problem, book):
    with fickle(turn) as server, pytest.raises(ChatError, match=problem):
        model(server.url, book).ask([ChatRequest(str(i), "?") for i in range(3)])


def test_no_secret_is_told(book):
    with pytest.raises(ChatError, match="set the variable MY_KEY anew") as caught:
        model("http://me:password@127.0.0.1:9/v1", book, key="sk-secr\net")
    assert "secr" not in str(caught.value) and "password" not in str(caught.value)
    (answer,) = model("http://me:password@127.0.0.1:9/v1", book, key="sk-secret\n").ask([ChatRequest("a", "?")])
    assert "secret" not in answer.error and "password" not in answer.error and "127.0.0.1:9/v1" in answer.error


def test_an_answer_of_no_use_costs_and_is_asked_for_anew(book):
    request = ChatRequest("a", "?")
    with fickle(GOOD, completion("no")) as server:
        asked = model(server.url, book)
        assert asked.ask([request])[0].text == "yes"
        assert asked.ask([request])[0].text == "yes", "an answer that was kept"
        assert book.spent_today() == 7
        asked.forget([request])
        assert asked.ask([request])[0].text == "no"
        assert book.spent_today() == 14


def test_what_a_cut_off_or_empty_answer_cost_counts(book):
    cut = (200, {}, json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}))
    empty = completion(" ")
    with fickle(cut, empty) as server:
        asked = model(server.url, book)
        asked.ask([ChatRequest("a", "?" * 400)])
        assert book.spent_today() >= 100, "estimated, where the endpoint does not say"
        spent = book.spent_today()
        asked.ask([ChatRequest("b", "?")])
        assert book.spent_today() == spent + 14


def test_an_endpoint_that_stays_busy_is_not_asked_by_all(book):
    with fickle((503, {}, "")) as server:
        answers = model(server.url, book, concurrency=1).ask([ChatRequest(str(i), "?") for i in range(20)])
        assert all(answer.retryable for answer in answers)
        assert len(server.seen) == 6, "three requests of two attempts each"
