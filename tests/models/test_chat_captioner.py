"""How answers of chat models are read."""

import pytest

from models.chat_captioner import parse_json_object


@pytest.mark.parametrize(
    "text",
    [
        '{"a": ["one\x13two"]}',  # vLLM lets models write control characters into texts
        '{\n\t"a" : ["one\ntwo"] \r}',
        '```json\n{"a": ["one two"]}\n```',
    ],
)
def test_the_object_in_an_answer_is_found(text):
    assert parse_json_object(text) == {"a": ["one two"]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("I see a man.", "it is not JSON"),
        ('{"a": [', "it is not JSON"),
        ("[1]", "a JSON list, expected an object"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_what_is_no_object_is_told(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_json_object(text)
