"""The packaged language model as a trunk, and its tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaModel

from models import weights
from models.language_model import (
    LanguageModelError,
    build_language_model,
    describe_language_model,
    load_language_model,
)


@pytest.fixture(scope="module")
def language_model() -> tuple[LlamaModel, Tokenizer]:
    return load_language_model(weights.file("smollm2_135m"))


def test_it_speaks_english(language_model: tuple[LlamaModel, Tokenizer]) -> None:
    model, tokenizer = language_model
    words = torch.tensor([tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        logits = model(words).last_hidden_state[0, -1] @ model.embed_tokens.weight.T
    assert tokenizer.decode([logits.argmax().item()]) == " Paris"


def test_tokenizer_round_trip_and_digits(language_model: tuple[LlamaModel, Tokenizer]) -> None:
    tokenizer = language_model[1]
    text = "Person 12: caf\u00e9, \u4f60\u597d"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("Person 12:").tokens == ["Person", "\u0120", "1", "2", ":"]
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_first_layers_are_those_of_the_whole(language_model: tuple[LlamaModel, Tokenizer]) -> None:
    model, _ = load_language_model(weights.file("smollm2_135m"), 2)
    whole = language_model[0].state_dict()
    assert len(model.layers) == 2
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())


def test_described_model_can_be_built_again(language_model: tuple[LlamaModel, Tokenizer]) -> None:
    fields = json.loads(json.dumps(describe_language_model(language_model[0])))
    again = build_language_model(fields | {"num_hidden_layers": 1})
    assert describe_language_model(again) == fields | {"num_hidden_layers": 1}
    assert torch.equal(again.rotary_emb.inv_freq, language_model[0].rotary_emb.inv_freq)


def test_folder_in_the_hugging_face_layout(tmp_path: Path, language_model: tuple[LlamaModel, Tokenizer]) -> None:
    fields = describe_language_model(language_model[0]) | {"num_hidden_layers": 2, "vocab_size": 60}
    fields |= {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = build_language_model(fields)
    model.save_pretrained(tmp_path)
    language_model[1].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    loaded, tokenizer = load_language_model(tmp_path, 1)
    assert len(loaded.layers) == 1
    assert torch.equal(loaded.layers[0].mlp.up_proj.weight, model.layers[0].mlp.up_proj.weight)
    assert tokenizer.encode("Plot:").ids == language_model[1].encode("Plot:").ids


def test_more_layers_than_there_are() -> None:
    with pytest.raises(LanguageModelError, match="31 layers wanted of .*: expected 1 to 30"):
        load_language_model(weights.file("smollm2_135m"), 31)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(LanguageModelError, match="no language model at .*nowhere: expected a .gguf file or a folder"):
        load_language_model(tmp_path / "nowhere")


def test_another_kind_of_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(LanguageModelError, match="'bert' model: expected one of the LLaMA family"):
        load_language_model(tmp_path)
