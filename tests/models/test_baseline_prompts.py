from hypothesis import given
from hypothesis import strategies as st

from models.baseline_prompts import TOKENS, Prompt, write_prompts
from models.script import Character, Story, StoryCharacter, StoryFrame


def count(text: str) -> int:
    return len(text.split())


def write(characters_first: bool = False, **frame) -> Prompt:
    people = [Character(identity=name, description=told) for name, told in frame.pop("people", {}).items()]
    story = Story(
        characters=[StoryCharacter(identity=person.identity) for person in people],
        frames=[StoryFrame(characters=people, **frame)],
    )
    (prompt,) = write_prompts(story, count, characters_first)
    return prompt


FRAME = {
    "people": {"Anna": ["a girl in red", "freckles"], "Ben": []},
    "scene_elements": ["fog"],
    "plot": ["they run"],
}


def test_what_happens_leads_or_the_characters_do():
    assert write(**FRAME) == Prompt("they run a girl in red freckles Ben fog")
    assert write(characters_first=True, **FRAME) == Prompt("a girl in red freckles Ben they run fog")


def test_characters_that_lead_leave_half_of_the_room():
    people = {"Anna": ["x " * 30 + "a", "y " * 30 + "b"]}
    prompt = write(characters_first=True, people=people, plot=["they run " * 10])
    assert prompt.text.startswith("x ")
    assert prompt.text.endswith("they run")
    assert prompt.left_out == ("y " * 30 + "b",)


def test_sentences_without_room_are_left_out_and_shorter_ones_behind_them_stay():
    prompt = write(plot=["a dog " * 30, "one " * 40, "the sea"])
    assert prompt == Prompt(("a dog " * 30).strip() + " the sea", (("one " * 40).strip(),))


def test_a_sentence_longer_than_all_the_room_is_cut_between_words():
    prompt = write(plot=["a " * 75 + "dog runs"])
    assert prompt == Prompt(("a " * 75).strip(), ("dog runs",))


def test_a_sentence_without_spaces_is_cut_between_characters():
    story = Story(frames=[StoryFrame(plot=["\u6d77" * 75 + "\u5c71\u6c34 \u96e8", "\u96ea" * 80])])
    (prompt,) = write_prompts(story, lambda text: len(text.replace(" ", "")))
    assert prompt == Prompt("\u6d77" * 75, ("\u5c71\u6c34 \u96e8", "\u96ea" * 80))


sentences = st.lists(st.integers(1, 90).map(lambda n: "w " * (n - 1) + "w"), max_size=4)


@given(people=sentences, scene=sentences, plot=sentences, first=st.booleans())
def test_a_prompt_fits_and_nothing_is_lost_untold(people, scene, plot, first):
    if not (people or scene or plot):
        plot = ["w"]
    prompt = write(first, people={"Anna": people} if people else {}, scene_elements=scene, plot=plot)
    assert 0 < count(prompt.text) <= TOKENS
    assert sum(map(count, [*people, *scene, *plot])) == count(prompt.text) + sum(map(count, prompt.left_out))
