"""Chat models from a folder, on tiny checkpoints in the published layout."""

import io
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from models.chat import ChatError, ChatRequest
from models.chat_captioner import encode_jpeg
from models.vision_language import LocalChatModel
from tests.tiny_checkpoints import save_deepseek_vl, save_deepseek_vl_hybrid, save_llama, save_qwen3_vl

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = range(4)


def picture(level: int, width: int = 60) -> bytes:
    rng = np.random.default_rng(level)
    return encode_jpeg(np.kron(rng.integers(0, 256, (4, width // 10, 3)), np.ones((10, 10, 1))).astype(np.uint8))


@pytest.fixture(scope="module", params=["qwen3_vl", "deepseek_vl", "deepseek_vl_hybrid"])
def folder(request, tmp_path_factory):
    save = {"qwen3_vl": save_qwen3_vl, "deepseek_vl": save_deepseek_vl, "deepseek_vl_hybrid": save_deepseek_vl_hybrid}
    return save[request.param](tmp_path_factory.mktemp("a model"))


def ask(folder, requests):
    return LocalChatModel(folder, device="cpu").ask(requests)


def test_what_is_answered_depends_on_the_picture_and_not_on_the_batch(folder):
    requests = [ChatRequest(str(level), "What is it?", "Look.", (picture(level),), max_tokens=300) for level in LEVELS]
    model = LocalChatModel(folder, device="cpu")
    alone, together = [answer for request in requests for answer in model.ask([request])], model.ask(requests)
    assert [answer.key for answer in alone] == [str(level) for level in LEVELS]
    assert len({answer.text for answer in alone}) > 1
    assert alone == together


def test_several_pictures_of_different_sizes_stand_in_their_order(folder):
    one, other = picture(10), picture(200, width=90)
    requests = [ChatRequest("ab", "?", pictures=(one, other), max_tokens=300)]
    requests += [ChatRequest("ba", "?", pictures=(other, one), max_tokens=300)]
    forward, backward = ask(folder, requests)
    assert forward.text is not None and backward.text is not None
    assert forward.text != backward.text


def test_a_prompt_reads_as_the_published_code_reads_it(tmp_path):
    """DeepSeek's own processor runs without torchvision: both ways give the model the same inputs."""
    folder = save_deepseek_vl(tmp_path)
    model = LocalChatModel(folder, device="cpu")
    request = ChatRequest("a", "What is it?", "", (picture(30),))
    text = model._write_prompt(request)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.image_token = "<picture>"
    processor = transformers.DeepseekVLProcessor(
        transformers.DeepseekVLImageProcessorPil.from_pretrained(folder), tokenizer, num_image_tokens=4
    )
    theirs = processor(text=[text], images=[Image.open(io.BytesIO(request.pictures[0]))], add_special_tokens=False)
    (filled,), seen = model._eyes.look([text], [Image.open(io.BytesIO(request.pictures[0]))])
    assert (
        model._tokenizer(filled, add_special_tokens=False)["input_ids"]
        == torch.as_tensor(theirs["input_ids"])[0].tolist()
    )
    assert torch.equal(seen["pixel_values"], torch.as_tensor(np.asarray(theirs["pixel_values"])))


def test_a_broken_picture_is_refused_and_the_others_of_its_batch_are_answered(folder):
    requests = [ChatRequest("good", "?", pictures=(picture(3),), max_tokens=300)]
    requests.insert(0, ChatRequest("bad", "?", pictures=(b"no picture",), max_tokens=300))
    bad, good = ask(folder, requests)
    assert bad.text is None and "cannot be asked this" in bad.error
    assert good.text is not None


def test_an_answer_that_is_cut_off_says_how_to_get_all_of_it(folder):
    texts = [answer.text for answer in ask(folder, [ChatRequest("a", "Hm?", max_tokens=300)])]
    assert texts != [None]
    (answer,) = ask(folder, [ChatRequest("a", "Hm?", max_tokens=1)])
    assert answer.text in (None, texts[0])
    assert answer.text is not None or "cut off after 1 tokens: raise max_tokens" in answer.error


def test_a_language_model_writes_and_sees_nothing(tmp_path):
    folder = save_llama(tmp_path)
    written, blind = ask(folder, [ChatRequest("a", "Hm?", "Be brief.", max_tokens=300),
                                  ChatRequest("b", "Hm?", pictures=(picture(1),))])  # fmt: skip
    assert written.text is not None
    assert blind.text is None and "sees no pictures: choose a vision-language model" in blind.error


SCHEMA = {
    "type": "object",
    "properties": {"qwertyui": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 3}},
    "required": ["qwertyui"],
    "additionalProperties": False,
}


def test_a_model_that_knows_nothing_writes_what_fits_the_schema(tmp_path):
    """Its weights are random: only what holds it to the schema makes its answers JSON."""
    folder = save_llama(tmp_path, ends_at_letters=False)
    requests = [ChatRequest(str(i), f"Hm {'m' * i}?", schema=SCHEMA, max_tokens=400) for i in range(3)]
    requests.append(ChatRequest("free", "Hm?", max_tokens=20))
    *held, free = ask(folder, requests)
    for answer in held:
        values = json.loads(answer.text)
        assert list(values) == ["qwertyui"] and all(len(text) <= 9 for text in values["qwertyui"])
    assert "cut off after 20 tokens" in free.error


def test_a_schema_that_cannot_be_held_to_is_refused_alone(tmp_path):
    folder = save_llama(tmp_path, ends_at_letters=False)
    odd = {"type": "object", "properties": {"a": {"type": "no such type"}}, "required": ["a"]}
    bad, good = ask(
        folder, [ChatRequest("bad", "?", schema=odd), ChatRequest("good", "?", schema=SCHEMA, max_tokens=400)]
    )
    assert bad.text is None and "cannot be held to the schema" in bad.error
    assert json.loads(good.text)


def test_a_folder_without_a_chat_model_is_named(tmp_path):
    with pytest.raises(ChatError, match="no chat model at .*nothing: expected a folder with config.json"):
        LocalChatModel(tmp_path / "nothing")
    transformers.CLIPVisionConfig().save_pretrained(tmp_path)
    save_llama(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tmp_path / "llama" / name).read_bytes())
    with pytest.raises(ChatError, match="holds a 'clip_vision_model' model: expected one of deepseek_vl"):
        LocalChatModel(tmp_path)
