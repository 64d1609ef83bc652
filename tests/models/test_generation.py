"""Sampling from a tiny story model: the windows, guidance, batches, history, references, seed and temperature."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from models.autoregressive import AutoregressiveModel, halve_trunk
from models.generation import Prompt, Sampler, Sampling, generate_many, no_progress
from models.gmm import guide
from models.script import Character, FrameScript
from models.sequence import Frame, Kind, build_sequence
from tests.models.test_autoregressive import CONFIG, log_likelihood, make_frames, make_model
from tests.models.test_window_cache import Context, slow_trunk

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = Sampling(window_frames=4, overlap_frames=2)
SLIDING = replace(SHORT, window="slide")


def generate(model, frames, *, history=(), references=(), seed=0, sampling=Sampling(), progress=no_progress):  # noqa: B008
    """One story by itself."""
    return generate_many(model, [Prompt(frames, history, references, seed)], sampling, progress)[0]


def scripts_only(frames: list[Frame]) -> list[Frame]:
    return [replace(frame, tokens=None) for frame in frames]


def make_story(count: int, seed: int = 0) -> list[Frame]:
    """Frames whose scripts differ in length; some have neither sentence nor face, some a second character."""
    rng, frames = np.random.default_rng(seed), []
    for index in range(count):
        names = ["Ann", "Bob"][: index % 3]
        people = [Character(identity=name, description=["a"] * int(rng.integers(2))) for name in names]
        script = FrameScript(characters=people, plot=["b"] * int(rng.integers(4)))
        sentences = rng.standard_normal((len(script.sentences()), 4)).astype(np.float32)
        faces = {0: rng.standard_normal(5).astype(np.float32)} if people and index % 2 else {}
        frames.append(Frame(script.layout(), sentences, faces, rng.standard_normal((2, 3)).astype(np.float32)))
    return frames


class SlowSampler:
    """Equation 5 spelt out: no cache; every pass reads all that was ever read, each entry with what it could see."""

    def __init__(self, model: AutoregressiveModel, prompt: Prompt, sampling: Sampling) -> None:
        self.model, self.prompt, self.sampling = model, prompt, sampling
        self.inputs: list[Tensor] = []
        self.contexts: list[Context] = []
        self.positions: list[int] = []
        self.window: list[list[int]] = []  # entries of the references, then of each frame
        self.previous = torch.zeros(2, 3)

    def put(self, embedding: Tensor, context: Context) -> int:
        self.contexts.append([*context, (len(self.inputs), len(context))])
        self.positions.append(len(context))
        self.inputs.append(embedding)
        return len(self.inputs) - 1

    def kept(self) -> Context:
        return [(entry, position) for position, entry in enumerate(e for part in self.window for e in part)]

    def embed(self, frames: list[Frame], references: list[np.ndarray] | tuple = ()) -> tuple[Tensor, np.ndarray]:
        sequence = build_sequence(frames, self.model.tokenizer, references)
        return self.model.embed(self.model.collate([sequence]))[0], sequence.kinds

    def read(self, embeddings: Tensor) -> None:
        """Read into the last part of the window."""
        for embedding in embeddings:
            self.window[-1].append(self.put(embedding, self.kept()))

    def restart(self, past: list[Frame]) -> None:
        self.window = [[]]
        if self.prompt.references:
            self.read(self.embed([], self.prompt.references)[0])
        for frame in past:
            self.window.append([])
            self.read(self.embed([frame])[0])
        if past:
            self.previous = self.model.standardize(torch.from_numpy(past[-1].tokens))
        else:
            self.previous = torch.zeros(2, 3)

    def mixture(self, entry: int, token: int):
        hidden = slow_trunk(self.model.trunk, torch.stack(self.inputs), self.contexts, self.positions)
        return self.model.mixture(hidden[entry], self.previous[token])

    @torch.no_grad()
    def run(self) -> np.ndarray:
        generator, past = torch.Generator().manual_seed(self.prompt.seed), list(self.prompt.history)
        most, overlap = self.sampling.window_frames, self.sampling.overlap_frames
        self.restart(past[-overlap:] if overlap else [])
        last: Tensor | None = None
        for frame in scripts_only(self.prompt.frames):
            if len(self.window) - 1 == most:
                if self.sampling.window == "restart":
                    self.restart(past[-overlap:] if overlap else [])
                    last = None
                else:
                    del self.window[1 + self.sampling.sink_frames]
            if last is not None:
                self.read(last)  # into the frame that it belongs to
            before = self.kept()
            self.window.append([])
            embeddings, kinds = self.embed([frame])
            self.read(embeddings)
            beside = self.kept()[len(before) :]
            aside: Context = []
            for (_, position), embedding, kind in zip(beside, embeddings, kinds, strict=True):
                if kind not in (Kind.SENTENCE, Kind.FACE):
                    aside.append((self.put_aside(embedding, before + aside, position), position))
            tokens = []
            for index in range(2):
                mixture = self.mixture(self.window[-1][-1], index)
                if self.sampling.guidance:
                    mixture = guide(mixture, self.mixture(aside[-1][0], index), self.sampling.guidance)
                mixture = type(mixture)(*(part[None] for part in vars(mixture).values()))
                tokens.append(mixture.sample(generator, self.sampling.temperature))
                last = self.model.token_projection(tokens[-1])
                if index == 0:
                    self.read(last)
                    position = self.positions[self.window[-1][-1]]
                    aside.append((self.put_aside(last[0], before + aside, position), position))
            self.previous = torch.cat(tokens)
            past.append(replace(frame, tokens=self.model.unstandardize(self.previous).numpy()))
        return np.stack([frame.tokens for frame in past[len(self.prompt.history) :]])

    def put_aside(self, embedding: Tensor, context: Context, position: int) -> int:
        entry = self.put(embedding, context)
        self.contexts[-1][-1], self.positions[-1] = (entry, position), position
        return entry


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize(
    "sampling", [SHORT, replace(SHORT, overlap_frames=0), SLIDING, replace(SLIDING, sink_frames=2)]
)
@pytest.mark.parametrize("past", [0, 3])
def test_sampling_equals_attention_written_out(sampling: Sampling, guidance: float, past: int) -> None:
    """Over several windows, or laps of one, with references and without."""
    model = make_model(replace(CONFIG, carry_previous=True))
    references = [frame.tokens for frame in make_frames(past, seed=4)]
    prompt = Prompt(make_story(11), make_story(past, seed=3), references, seed=2)
    sampling = replace(sampling, guidance=guidance)
    found = generate_many(model, [prompt], sampling)[0]
    assert found.shape == (11, 2, 3)
    np.testing.assert_allclose(found, SlowSampler(model, prompt, sampling).run(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("sampling", [SHORT, SLIDING])
def test_a_story_does_not_depend_on_its_batch(sampling: Sampling, guidance: float) -> None:
    model, sampling = make_model(replace(CONFIG, carry_previous=True)), replace(sampling, guidance=guidance)
    tokens = [frame.tokens for frame in make_frames(2, seed=4)]
    prompts = [
        Prompt(make_story(9), seed=1),
        Prompt(make_story(3, seed=5), make_story(4, seed=6), seed=2),
        Prompt([], make_story(1)),
        Prompt(make_story(12, seed=7), make_story(1, seed=8), tokens, seed=3),
        Prompt(make_story(9), seed=2),
    ]
    together = generate_many(model, prompts, sampling)
    assert [len(story) for story in together] == [9, 3, 0, 12, 9]
    for story, prompt in zip(together, prompts, strict=True):
        alone = generate(
            model,
            prompt.frames,
            history=prompt.history,
            references=prompt.references,
            seed=prompt.seed,
            sampling=sampling,
        )
        np.testing.assert_allclose(story, alone, atol=2e-5, rtol=1e-5)
    assert not np.isclose(together[0], together[4]).all(-1).any()


def test_windows_differ_only_once_they_are_full() -> None:
    model, prompt = make_model(), Prompt(make_story(6), make_story(1, seed=3), seed=1)
    sampling = Sampling(window_frames=5, overlap_frames=4)
    restarting, sliding = (generate_many(model, [prompt], replace(sampling, window=w))[0] for w in ("restart", "slide"))
    np.testing.assert_allclose(restarting[:4], sliding[:4], atol=1e-5)
    assert not np.isclose(restarting[4], sliding[4]).any()


@pytest.mark.parametrize("sampling", [SHORT, SLIDING, replace(SLIDING, guidance=1.0)])
def test_memory_shapes_and_positions_do_not_grow_with_the_story(sampling: Sampling) -> None:
    model = make_model()
    seen: list[tuple[int, int, int]] = []

    def note(trunk: torch.nn.Module, args: tuple, named: dict) -> None:
        mask = named["attention_mask"]
        attended = int((mask[0, 0] == 0).sum(-1).max())
        seen.append((mask.shape[-1], attended, int(named["position_ids"].max())))

    model.trunk.register_forward_pre_hook(note, with_kwargs=True)
    sizes = []
    for count in (8, 80):
        sampler = Sampler(model, [Prompt(scripts_only(make_frames(count)))], sampling)
        sizes.append(sampler.cache_bytes)
        for done in range(count):
            assert sampler.make_frames() == done + 1
    assert sizes[0] == sizes[1]
    slots, attended, positions = zip(*seen, strict=True)
    length = len(build_sequence(make_frames(1), model.tokenizer).kinds)
    assert set(slots) == {slots[0]}
    assert max(attended) == 4 * length - 1  # four frames but for the last token, which is read with the next script
    assert max(positions) < 2 * slots[0]


def test_guidance_changes_nothing_where_a_script_says_nothing() -> None:
    model = make_model(replace(CONFIG, components=1))
    said = scripts_only(make_frames(1))
    names = Frame(FrameScript(characters=[Character(identity="Ann")]).layout(), np.empty((0, 4), np.float32))
    frames = [names, names, *said, names]
    plain, guided = (generate(model, frames, sampling=Sampling(guidance=w, temperature=0.0)) for w in (0.0, 3.0))
    np.testing.assert_allclose(guided[:2], plain[:2], atol=1e-4)
    assert not np.isclose(guided[2], plain[2], atol=1e-2).any()


def test_a_trunk_in_half_precision() -> None:
    """As a float32 trunk of the same rounded weights but for rounding on the way, far into the window too."""
    model, half = make_model(), halve_trunk(make_model())
    for parameter in model.trunk.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    assert half.trunk.dtype == torch.bfloat16
    assert half.head.weight.dtype == half.trunk.rotary_emb.inv_freq.dtype == torch.float32
    frames = scripts_only(make_story(30))
    for m in (model, half):
        with torch.no_grad():
            m.head.bias[0] = 100.0  # the first component is sure
    for sampling in (Sampling(temperature=0.0), replace(SLIDING, temperature=0.0, guidance=0.5)):
        exact, found = (generate(m, frames, sampling=sampling) for m in (model, half))
        assert found.dtype == np.float32
        error = np.abs(exact - found).max((1, 2)) / exact.std()
        assert 0 < error.max() < 0.1


def test_seed_and_temperature() -> None:
    model, frames = make_model(), scripts_only(make_frames(3))
    first, again, other = (generate(model, frames, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.isclose(first, other).all(-1).any()


def test_cold_samples_are_likely() -> None:
    model, frames = make_model(), make_frames(4)

    def mean_likelihood(temperature: float) -> float:
        sampling = Sampling(temperature=temperature)
        made = [generate(model, frames, sampling=sampling, seed=seed) for seed in range(5)]
        filled = [[replace(f, tokens=t) for f, t in zip(frames, tokens, strict=True)] for tokens in made]
        return float(np.mean([log_likelihood(model, f).mean().item() for f in filled]))

    assert mean_likelihood(0.1) > mean_likelihood(1.0) > mean_likelihood(3.0)


def test_history_references_and_scripts_all_matter() -> None:
    model, frames = make_model(), scripts_only(make_frames(2))
    plain = generate(model, frames)
    past, tokens = make_frames(2, seed=9), [make_frames(1, seed=8)[0].tokens]
    other = [replace(frame, sentences=frame.sentences + 1) for frame in frames]
    for made in (
        generate(model, frames, history=past),
        generate(model, frames, references=tokens),
        generate(model, other),
    ):
        assert not np.isclose(made, plain).all(-1).any()


def test_references_and_first_frames_stay_in_a_sliding_window() -> None:
    """Long after, they matter; of a frame between them and the window, only what later frames took from it is left."""
    model, frames, references = make_model(), scripts_only(make_frames(12)), make_frames(2, seed=8)
    history = make_frames(1, seed=9)
    sampling = replace(SLIDING, temperature=0.0)
    with torch.no_grad():
        model.head.bias[0] = 100.0

    def last(references: list[Frame], history: list[Frame]) -> np.ndarray:
        tokens = [frame.tokens for frame in references]
        return generate(model, frames, history=history, references=tokens, sampling=sampling)[-1]

    plain = last(references, history)
    assert not np.allclose(plain, last(references[:1], history), atol=1e-4)
    assert not np.allclose(plain, last(references, make_frames(1, seed=10)), atol=1e-4)


def test_a_story_longer_than_the_window_goes_on_from_the_overlap() -> None:
    """The frame after a restart depends on the overlap and on nothing older."""
    model, frames = make_model(), scripts_only(make_frames(5))
    sampling = replace(SHORT, temperature=0.0)  # which still draws components: compare where one component is sure
    with torch.no_grad():
        model.head.bias[0] = 100.0
    made = generate(model, frames, sampling=sampling)
    past = [replace(frame, tokens=tokens) for frame, tokens in zip(frames, made, strict=True)]
    next_window = generate(model, frames[4:], history=past[2:4], sampling=sampling)
    np.testing.assert_allclose(next_window[0], made[4], atol=1e-5)
    whole = generate(model, frames, sampling=replace(sampling, window_frames=5))
    np.testing.assert_allclose(whole[:4], made[:4], atol=1e-5)
    assert not np.allclose(whole[4], made[4])


@pytest.mark.parametrize("overlap", [-1, 4])
def test_overlap_must_be_less_than_the_window(overlap: int) -> None:
    with pytest.raises(ValueError, match=f"overlap_frames {overlap}: expected 0 to window_frames - 1 = 3"):
        Sampling(window_frames=4, overlap_frames=overlap)


@pytest.mark.parametrize("sinks", [0, 3])
def test_sinks_must_leave_room_for_two_frames(sinks: int) -> None:
    with pytest.raises(ValueError, match=f"sink_frames {sinks}: expected 1 to window_frames - 2 = 2"):
        replace(SLIDING, sink_frames=sinks)
    replace(SHORT, sink_frames=sinks)


def test_progress_and_empty_stories() -> None:
    seen: list[tuple[int, int]] = []
    model = make_model()

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    generate(model, scripts_only(make_frames(2)), progress=note)
    generate_many(model, [Prompt(make_frames(2)), Prompt(make_frames(1))], progress=note)
    assert seen == [(1, 2), (2, 2), (2, 3), (3, 3)]
    assert generate(model, []).shape == (0, 2, 3)
    assert generate_many(model, []) == []


def test_generated_tokens_carry_the_frame_before() -> None:
    """With a sure last component, no noise and an empty head, the last frame of the history is repeated."""
    model = make_model(replace(CONFIG, carry_previous=True), trained=False)
    with torch.no_grad():
        model.head.bias.zero_()[3] = 100.0
    history = make_frames(2)
    made = generate(model, scripts_only(make_frames(3)), history=history, sampling=Sampling(temperature=0.0))
    np.testing.assert_allclose(made, np.repeat(history[-1].tokens[None], 3, 0), atol=1e-3)
