"""The story model at tiny size: what may see what, the losses, saving, and generation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models.autoregressive import (
    AutoregressiveConfig,
    AutoregressiveError,
    AutoregressiveModel,
    load_autoregressive,
    masked_causal_attention,
    save_autoregressive,
)
from models.gmm import fit_gaussian
from models.language_model import build_language_model
from models.script import Character, FrameScript
from models.sequence import Frame, build_sequence

pytestmark = pytest.mark.usefixtures("one_thread")

TRUNK = {
    "vocab_size": 20, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
CONFIG = AutoregressiveConfig(TRUNK, tokens_per_frame=2, token_dim=3, text_width=4, face_width=5, components=4)


def make_model(config: AutoregressiveConfig = CONFIG, trained: bool = True) -> AutoregressiveModel:
    """A tiny model; "trained" fills the head, so that predictions depend on the inputs."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["?", "Ann", ":", "Plot"])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    model = AutoregressiveModel(config, build_language_model(config.trunk), tokenizer).eval()
    model.fit_standardization(torch.randn(50, 2, 3) * torch.tensor([1.0, 5.0, 0.2]) + 3)
    if trained:
        torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def make_frames(count: int, seed: int = 0) -> list[Frame]:
    rng = np.random.default_rng(seed)
    script = FrameScript(characters=[Character(identity="Ann", description=["a"])], plot=["b", "c"])

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return [Frame(script.layout(), draw(3, 4), {0: draw(5)}, draw(2, 3)) for _ in range(count)]


def log_likelihood(model: AutoregressiveModel, frames: list[Frame], references: list[np.ndarray] | None = None):
    return model.log_likelihood(model.collate([build_sequence(frames, model.tokenizer, references or [])]))


def test_fresh_model_equals_the_fitted_gaussian() -> None:
    model = make_model(replace(CONFIG, components=1), trained=False)
    tokens = torch.randn(30, 2, 3)
    model.fit_standardization(tokens)
    frames = make_frames(4)
    likelihood = log_likelihood(model, frames).view(4, 2)
    for slot in range(2):
        values = torch.stack([torch.from_numpy(frame.tokens[slot]) for frame in frames])
        nll = fit_gaussian(tokens[:, slot]).nll(values, correlated=True)
        assert -likelihood[:, slot].mean().item() / 3 == pytest.approx(nll, abs=1e-5)


def test_standardized_training_tokens_are_white_and_can_be_undone() -> None:
    model = make_model()
    tokens = torch.randn(20_000, 2, 3) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.7]]) + 2
    model.fit_standardization(tokens)
    white = model.standardize(tokens.view(-1, 3)).view(-1, 2, 3)
    for slot in range(2):
        torch.testing.assert_close(torch.cov(white[:, slot].T), torch.eye(3), atol=0.02, rtol=0)
    torch.testing.assert_close(model.unstandardize(white.view(-1, 3)).view_as(tokens), tokens, atol=1e-4, rtol=0)


def test_what_all_sentences_share_does_not_matter() -> None:
    model, frames = make_model(), make_frames(2)
    shared = torch.tensor([5.0, -3.0, 0.0, 1.0])
    moved = [replace(frame, sentences=frame.sentences + shared.numpy()) for frame in frames]
    before = log_likelihood(model, frames)
    assert not torch.allclose(before, log_likelihood(model, moved))
    model.fit_text_mean(shared.repeat(3, 1))
    torch.testing.assert_close(before, log_likelihood(model, moved), atol=1e-4, rtol=1e-4)
    model.fit_text_mean(torch.empty(0, 4))  # no sentence in any script
    assert torch.equal(model.text_mean, shared)


def test_density_of_a_token_integrates_to_one() -> None:
    config = replace(CONFIG, token_dim=1, tokens_per_frame=1)
    torch.manual_seed(0)
    model = AutoregressiveModel(config, build_language_model(TRUNK), make_model().tokenizer).eval()
    torch.nn.init.normal_(model.head.weight)
    model.fit_standardization(torch.randn(20, 1, 1) * 4 + 2)
    (frame,) = make_frames(1)
    grid = torch.linspace(-150, 150, 3001)
    windows = [build_sequence([replace(frame, tokens=np.asarray([[x]], np.float32))], model.tokenizer) for x in grid]
    density = model.log_likelihood(model.collate(windows)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-3)


def test_a_token_is_predicted_from_what_comes_before_and_nothing_else() -> None:
    model, frames = make_model(), make_frames(3)
    before = log_likelihood(model, frames)
    changed = [frames[0], replace(frames[1], tokens=frames[1].tokens + 1), frames[2]]
    after = log_likelihood(model, changed)
    assert torch.equal(before[:2], after[:2])
    rescripted = [frames[0], replace(frames[1], sentences=frames[1].sentences + 1), frames[2]]
    same = log_likelihood(model, rescripted) == before
    assert same[:2].all()
    assert not same[2:].any()
    assert not torch.equal(before[4:], after[4:])


def test_the_first_token_matters_to_the_second() -> None:
    model, frames = make_model(), make_frames(1)
    changed = frames[0].tokens.copy()
    changed[0] += 1
    first, second = log_likelihood(model, frames) == log_likelihood(model, [replace(frames[0], tokens=changed)])
    assert not first  # its own value changed
    assert not second


def test_references_are_read_but_not_predicted() -> None:
    model, frames = make_model(), make_frames(2)
    reference = make_frames(1, seed=5)[0].tokens
    plain, few_shot = log_likelihood(model, frames), log_likelihood(model, frames, [reference])
    assert plain.shape == few_shot.shape == (4,)
    assert not torch.isclose(plain, few_shot).any()


def test_padding_and_batch_do_not_matter() -> None:
    model = make_model()
    short, long = make_frames(1), make_frames(3, seed=1)
    both = model.log_likelihood(model.collate([build_sequence(f, model.tokenizer) for f in (short, long)]))
    apart = torch.cat([log_likelihood(model, short), log_likelihood(model, long)])
    torch.testing.assert_close(both, apart, atol=1e-4, rtol=1e-5)


def test_carried_tokens_are_those_of_the_frame_before_in_the_same_sequence() -> None:
    carrying = make_model(replace(CONFIG, carry_previous=True))
    plain = make_model()
    references = {3: [make_frames(1, seed=5)[0].tokens], 2: []}
    windows = [build_sequence(make_frames(n, seed=n), plain.tokenizer, references[n]) for n in (3, 2)]
    batch = plain.collate(windows)
    mixture, targets = carrying.predict(batch)
    added = (mixture.locations - plain.predict(batch)[0].locations).view(5, 2, 4, 3)
    rows = targets.view(5, 2, 3)
    for frame in (0, 3):  # the first of each sequence
        assert added[frame].abs().max() < 1e-5
    for frame in (1, 2, 4):
        expected = torch.linspace(0, 1, 4)[None, :, None] * rows[frame - 1][:, None]
        torch.testing.assert_close(added[frame], expected, atol=1e-5, rtol=1e-4)


def test_losses_follow_the_equations() -> None:
    model, frames = make_model(), make_frames(3)
    batch = model.collate([build_sequence(frames, model.tokenizer)])
    losses = model.losses(batch)
    mixture, targets = model.predict(batch)
    torch.testing.assert_close(losses.nll, -mixture.log_prob(targets).mean() / 3)
    torch.testing.assert_close(losses.l1, torch.nn.functional.l1_loss(mixture.mean(), targets))
    torch.testing.assert_close(losses.l2, torch.nn.functional.mse_loss(mixture.mean(), targets))
    torch.testing.assert_close(losses.total, losses.nll + losses.l1 + losses.l2)


@pytest.mark.parametrize("name", ["input_dropout", "residual_dropout", "mask_probability", "context_noise"])
def test_each_measure_acts_in_training_only(name: str) -> None:
    none = {"input_dropout": 0.0, "residual_dropout": 0.0, "mask_probability": 0.0}
    model = make_model(replace(CONFIG, **none | {name: 0.5}))
    batch = model.collate([build_sequence(make_frames(3), model.tokenizer)])
    assert torch.equal(model.losses(batch).nll, model.losses(batch).nll)
    model.train()
    assert not torch.equal(model.losses(batch).nll, model.losses(batch).nll)


def test_context_noise_leaves_what_is_predicted_as_it_is() -> None:
    model = make_model(replace(CONFIG, context_noise=3.0, carry_previous=True))
    batch = model.collate([build_sequence(make_frames(3), model.tokenizer)])
    _, targets = model.predict(batch)
    model.train()
    _, disturbed = model.predict(batch)
    assert torch.equal(targets, disturbed)


def test_attention_mask_hides_positions_but_never_from_themselves() -> None:
    torch.manual_seed(0)
    mask = masked_causal_attention(200, 20, 0.15, torch.zeros(1))
    visible = mask[:, 0] == 0
    assert mask.shape == (200, 1, 20, 20)
    assert visible.diagonal(dim1=1, dim2=2).all()
    assert not visible.triu(1).any()
    below = torch.ones(20, 20, dtype=torch.bool).tril(-1)
    assert visible[:, below].float().mean().item() == pytest.approx(0.85, abs=0.02)
    column = visible[:, :, 3][:, 4:]
    assert (column.all(1) | ~column.any(1)).all()  # a hidden position is hidden from all later ones


def test_unmasked_training_mask_equals_plain_causal_attention() -> None:
    model = make_model()
    inputs = model.embed(model.collate([build_sequence(make_frames(2), model.tokenizer)]))
    mask = masked_causal_attention(1, inputs.shape[1], 0.0, inputs)
    plain, masked = (model.trunk(inputs_embeds=inputs, attention_mask=m).last_hidden_state for m in (None, mask))
    torch.testing.assert_close(plain, masked, atol=1e-5, rtol=1e-5)


def test_components_part_and_the_word_table_stays() -> None:
    model = make_model(trained=False).train()
    words = model.trunk.embed_tokens.weight.clone()
    trained = [*model.new_parameters().values(), *model.trunk_parameters().values()]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    batch = model.collate([build_sequence(make_frames(3), model.tokenizer)])
    for _ in range(5):
        optimizer.zero_grad()
        model.losses(batch).total.backward()
        optimizer.step()
    assert torch.equal(model.trunk.embed_tokens.weight, words)
    assert all(p.grad is not None for p in trained)
    mixture, _ = model.eval().predict(batch)
    assert mixture.locations.std(-2).min() > 1e-3


def test_saved_and_loaded_model_is_the_same(tmp_path: Path) -> None:
    model, frames = make_model(), make_frames(2)
    save_autoregressive(model, tmp_path)
    first = (tmp_path / "model.safetensors").read_bytes()
    loaded = load_autoregressive(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert torch.equal(log_likelihood(loaded, frames), log_likelihood(model, frames))
    save_autoregressive(loaded, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("content", [b"", b"not a model at all"])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(AutoregressiveError, match="x.safetensors holds no story model .*moviedreamer train"):
        load_autoregressive(path)
