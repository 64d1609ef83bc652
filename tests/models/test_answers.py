"""Answers that are kept: of a model that runs here, by what was asked and which model was asked."""

import pytest

from models.answers import AnswerBook, RememberingModel
from models.chat import ChatAnswer, ChatRequest


class Echo:
    """Answers with what it was asked, but for `?`; dies when it is asked too much."""

    def __init__(self, most=100):
        self.batches, self._left = [], most

    def ask(self, requests):
        self.batches.append([request.key for request in requests])
        self._left -= len(requests)
        if self._left < 0:
            raise RuntimeError("killed")
        return [ChatAnswer(r.key, None if r.text == "?" else r.text, "cannot be asked") for r in requests]


@pytest.fixture
def book(tmp_path):
    return AnswerBook(tmp_path / "answers.sqlite")


REQUESTS = [ChatRequest(letter, f"say {letter}") for letter in "abcde"]


def test_what_was_asked_before_is_not_asked_again(book):
    assert [a.text for a in RememberingModel(Echo(), "x", book, 2).ask(REQUESTS[1:3])] == ["say b", "say c"]
    echo = Echo()
    answers = RememberingModel(echo, "x", book, 2).ask(REQUESTS)
    assert [(a.key, a.text) for a in answers] == [(r.key, r.text) for r in REQUESTS]
    assert echo.batches == [["a", "d"], ["e"]]


def test_a_killed_run_asks_what_is_missing(book):
    with pytest.raises(RuntimeError, match="killed"):
        RememberingModel(Echo(most=3), "x", book, 2).ask(REQUESTS)
    echo = Echo()
    RememberingModel(echo, "x", book, 2).ask(REQUESTS)
    assert echo.batches == [["c", "d"], ["e"]]


def test_another_model_and_what_was_forgotten_are_asked_anew(book):
    model, echo = RememberingModel(Echo(), "x", book, 8), Echo()
    model.ask(REQUESTS)
    RememberingModel(echo, "y", book, 8).ask(REQUESTS[:1])
    model.forget(REQUESTS[1:2])
    RememberingModel(echo, "x", book, 8).ask(REQUESTS)
    assert echo.batches == [["a"], ["b"]]


def test_a_refusal_is_not_kept(book):
    refused = [ChatRequest("a", "?")]
    echo = Echo()
    for _ in range(2):
        (answer,) = RememberingModel(echo, "x", book, 8).ask(refused)
        assert (answer.text, answer.error) == (None, "cannot be asked")
    assert echo.batches == [["a"], ["a"]]
