"""The story model: from scripts and the frames so far to the tokens of the next keyframe.

Each modality is projected into the embedding space of a pretrained LLaMA by a two-layer GELU network; the trunk
reads the sequence causally; a mixture head predicts each frame token from the position before it.

Dimensions: batch, position = place in the sequence, hidden = width of the trunk, token = tokens a frame,
dim = width of a frame token, target = frame tokens to predict, row by row, text, face_width = embedding widths.

Source: the paper, section 3.3 (equations 2 to 5) and appendix A (equations 6 to 8).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaModel

from models.gmm import Mixture, fit_gaussian, mixture_of_parameters, parameter_count
from models.language_model import build_language_model
from models.processes import Precision, autocast
from models.sequence import FrameSequence, Kind, SequenceBatch, collate_sequences

METADATA_KEY = "moviedreamer"
"""Where model.safetensors keeps config and tokenizer."""
LOCATION_SPREAD = 0.1
"""Standard deviation of the components' first locations, in standardized token units."""


class AutoregressiveError(ValueError):
    """A story model cannot be used; the message names the value and the remedy."""


@dataclass(frozen=True)
class AutoregressiveConfig:
    """Everything that is needed to build the model again.

    Attributes:
        trunk: Fields of transformers' `LlamaConfig`.
        tokens_per_frame: 2 in the paper.
        token_dim: Width of a frame token.
        text_width: Width of a sentence embedding.
        face_width: Width of a face embedding.
        components: k of the mixture.
        scale_floor: Smallest standard deviation of a component, in standardized token units.
        input_dropout: Dropout on the projected sentences, faces and frame tokens.
        residual_dropout: Dropout on the output of each attention and feed-forward branch of the trunk.
        mask_probability: Chance, in training, that a position is hidden from all others.
        context_noise: Largest standard deviation of the noise, in training, on frame tokens that are read (not on
            those that are predicted), in standardized units. Not in the paper: frames that the model goes on from
            are its own, and a little wrong; without this, short stories drift into blends of pictures.
        carry_previous: Whether a learned share of the same token of the frame before is added to each component's
            location, from none of it in the first component to all of it in the last. Not in the paper: within a
            few hundred steps a model does not find out by attention alone that adjacent keyframes are alike.
    """

    trunk: dict[str, Any]
    tokens_per_frame: int
    token_dim: int
    text_width: int
    face_width: int
    components: int = 16
    scale_floor: float = 1e-6
    input_dropout: float = 0.5
    residual_dropout: float = 0.5
    mask_probability: float = 0.15
    context_noise: float = 0.0
    carry_previous: bool = False


class Losses(NamedTuple):
    """Means over the targets of a batch.

    Attributes:
        nll: Negative log-likelihood of standardized tokens, nats a token dimension (equation 8).
        l1: Mean absolute difference of mixture mean and token.
        l2: Mean squared difference.
    """

    nll: Float[Tensor, ""]
    l1: Float[Tensor, ""]
    l2: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        """Equation 3."""
        return self.nll + self.l1 + self.l2


class Projection(nn.Module):
    """Two linear layers with GELU; inputs may first be scaled to a root mean square of 1.

    Source: the paper, appendix A.
    """

    def __init__(self, width: int, hidden: int, unit_rms: bool) -> None:
        super().__init__()
        self.unit_rms = unit_rms
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, values: Float[Tensor, "row width"]) -> Float[Tensor, "row hidden"]:
        # Embeddings of unit length have entries near 1/sqrt(width), too small for a fresh linear layer.
        if self.unit_rms:
            values = nn.functional.rms_norm(values, values.shape[-1:], eps=1e-12)
        return self.layers(values)


class AutoregressiveModel(nn.Module):
    """The story model. Tokens are standardized inside with statistics that the checkpoint keeps.

    Attributes:
        precision: Of the trunk's matrix products; projections, mixture head and losses are always float32.

    Source: the paper, section 3.3.
    """

    def __init__(self, config: AutoregressiveConfig, trunk: LlamaModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.precision: Precision = "float32"
        self.trunk = trunk
        self.trunk.embed_tokens.requires_grad_(False)
        hidden = trunk.config.hidden_size
        self.text_projection = Projection(config.text_width, hidden, unit_rms=True)
        self.face_projection = Projection(config.face_width, hidden, unit_rms=True)
        self.token_projection = Projection(config.token_dim, hidden, unit_rms=False)
        self.frame_marks = nn.Parameter(torch.randn(2, hidden) * trunk.embed_tokens.weight.std())
        self.head = nn.Linear(hidden, parameter_count(config.components, config.token_dim))
        self.carry = None
        if config.carry_previous:
            shares = torch.linspace(0, 1, config.components) if config.components > 1 else torch.tensor([0.5])
            self.carry = nn.Parameter(shares.unsqueeze(-1).repeat(1, config.token_dim))
        self.register_buffer("text_mean", torch.zeros(config.text_width))
        self.register_buffer("token_mean", torch.zeros(config.tokens_per_frame, config.token_dim))
        identity = torch.eye(config.token_dim).repeat(config.tokens_per_frame, 1, 1)
        self.register_buffer("token_whitening", identity)
        self.register_buffer("token_coloring", identity.clone())
        _reset_head(self.head, config)
        _add_residual_dropout(trunk, config.residual_dropout)

    def fit_standardization(self, tokens: Float[Tensor, "frame token dim"]) -> None:
        """Take the statistics of the training tokens, for each token of a frame by itself.

        Standardized tokens have zero mean, unit variance and no correlations (shrunk as in `fit_gaussian`), which
        suits components that are diagonal: the fresh head equals the fitted Gaussian.
        """
        for index, rows in enumerate(tokens.unbind(1)):
            gaussian = fit_gaussian(rows.cpu())
            variances, axes = torch.linalg.eigh(gaussian.covariance)
            self.token_mean[index] = gaussian.mean
            self.token_whitening[index] = axes / variances.sqrt()
            self.token_coloring[index] = (axes * variances.sqrt()).T

    def fit_text_mean(self, sentences: Float[Tensor, "sentence text"]) -> None:
        """Take the mean of the training sentences' embeddings, which is then subtracted.

        Sentences of one captioner share most of their embedding; what tells them apart is the rest.
        """
        if len(sentences):
            self.text_mean.copy_(sentences.mean(0))

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters, by name, that do not come from the pretrained trunk."""
        return {name: p for name, p in self._trainable() if not name.startswith("trunk.")}

    def trunk_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the trunk, by name; the table of words stays frozen."""
        return {name: p for name, p in self._trainable() if name.startswith("trunk.")}

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def standardize(self, tokens: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
        """Whole frames of raw tokens, row by row, to standardized ones."""
        frames = tokens.view(-1, self.config.tokens_per_frame, self.config.token_dim)
        return _multiply(frames - self.token_mean, self.token_whitening).reshape(tokens.shape)

    def unstandardize(self, tokens: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
        """The inverse of `standardize`."""
        frames = tokens.view(-1, self.config.tokens_per_frame, self.config.token_dim)
        return (_multiply(frames, self.token_coloring) + self.token_mean).reshape(tokens.shape)

    def collate(self, sequences: Sequence[FrameSequence]) -> SequenceBatch:
        """Batch sequences on the model's device."""
        config = self.config
        batch = collate_sequences(sequences, config.text_width, config.face_width, config.token_dim)
        return batch.to(self.token_mean.device)

    def embed(
        self, batch: SequenceBatch, tokens: Float[Tensor, "row dim"] | None = None
    ) -> Float[Tensor, "batch position hidden"]:
        """The trunk's inputs; frame tokens must stand in whole frames.

        Args:
            batch: What to read.
            tokens: Standardized frame tokens to read in place of the batch's own.
        """
        tokens = self.standardize(batch.tokens) if tokens is None else tokens
        inputs = self.trunk.embed_tokens(batch.words).to(tokens.dtype)  # the trunk may be in half precision
        rows = {
            Kind.SENTENCE: self._project(self.text_projection, batch.sentences - self.text_mean),
            Kind.FACE: self._project(self.face_projection, batch.faces),
            Kind.TOKEN: self._project(self.token_projection, tokens),
        }
        kinds = torch.where(batch.kinds == Kind.REFERENCE, Kind.TOKEN, batch.kinds)
        for kind, values in rows.items():
            inputs = inputs.masked_scatter((kinds == kind).unsqueeze(-1), values)
        for kind, mark in zip((Kind.START_OF_FRAME, Kind.END_OF_FRAME), self.frame_marks, strict=True):
            inputs = torch.where((kinds == kind).unsqueeze(-1), mark, inputs)
        return inputs

    def _project(self, projection: Projection, values: Tensor) -> Tensor:
        return nn.functional.dropout(projection(values), self.config.input_dropout, self.training)

    def predict(self, batch: SequenceBatch) -> tuple[Mixture, Float[Tensor, "target dim"]]:
        """Mixtures of the frame tokens, standardized, and the standardized tokens themselves.

        Positions of reference frames are no targets.
        """
        tokens = self.standardize(batch.tokens)
        read = self._disturb(tokens)
        inputs = self.embed(batch, read)
        mask = None
        if self.training and self.config.mask_probability > 0:
            mask = masked_causal_attention(*inputs.shape[:2], self.config.mask_probability, inputs)
        with autocast(inputs.device.type, self.precision):
            hidden = self.trunk(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        is_target = batch.kinds == Kind.TOKEN
        is_row = is_target | (batch.kinds == Kind.REFERENCE)
        targets = is_target[is_row]
        previous = self._previous_tokens(read, targets, is_row.nonzero()[:, 0])
        return self.mixture(hidden[:, :-1][is_target[:, 1:]], previous[targets]), tokens[targets]

    def _disturb(self, tokens: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
        """In training, add noise; all tokens of a frame get the same amount of it, drawn from 0 to `context_noise`."""
        if not self.training or self.config.context_noise == 0:
            return tokens
        frames = tokens.view(-1, self.config.tokens_per_frame, self.config.token_dim)
        scale = self.config.context_noise * torch.rand(len(frames), 1, 1, device=tokens.device)
        return (frames + scale * torch.randn_like(frames)).view(tokens.shape)

    def _previous_tokens(self, tokens: Tensor, is_target: Tensor, sequence: Tensor) -> Tensor:
        """For each row the same token of the frame before in its sequence; zeros, the mean, for a first frame."""
        before = torch.arange(len(tokens), device=tokens.device) - self.config.tokens_per_frame
        present = (before >= 0) & is_target[before] & (sequence[before] == sequence)
        return torch.where(present.unsqueeze(-1), tokens[before], 0.0)

    def mixture(self, hidden: Float[Tensor, "row hidden"], previous: Float[Tensor, "row dim"]) -> Mixture:
        """What the head makes of the trunk's output: the next frame token, standardized.

        Args:
            hidden: The trunk's output at the position before.
            previous: The same token of the frame before, standardized; zeros where there is none.
        """
        mixture = mixture_of_parameters(self.head(hidden), self.config.components, self.config.scale_floor)
        if self.carry is None:
            return mixture
        return replace(mixture, locations=mixture.locations + self.carry * previous.unsqueeze(-2))

    def losses(self, batch: SequenceBatch) -> Losses:
        """Training losses of a batch.

        Source: the paper, equations 3 and 8.
        """
        mixture, targets = self.predict(batch)
        difference = mixture.mean() - targets
        nll = -mixture.log_prob(targets).mean() / self.config.token_dim
        return Losses(nll, difference.abs().mean(), difference.square().mean())

    @torch.no_grad()
    def log_likelihood(self, batch: SequenceBatch) -> Float[Tensor, " target"]:
        """Log density of each raw (not standardized) frame token, in nats.

        Standardizing is linear, so its Jacobian is added; values compare with any density of raw tokens.
        """
        mixture, targets = self.predict(batch)
        jacobian = torch.linalg.slogdet(self.token_whitening).logabsdet
        return mixture.log_prob(targets) + jacobian.repeat(len(targets) // self.config.tokens_per_frame)


def _multiply(frames: Tensor, matrices: Tensor) -> Tensor:
    """Each token of each frame, as a row, times its own matrix."""
    return torch.einsum("ftd,tde->fte", frames, matrices)


def masked_causal_attention(
    batch: int, positions: int, probability: float, like: Tensor
) -> Float[Tensor, "batch 1 position position"]:
    """A causal additive attention mask in which random positions are hidden from all others, never from themselves.

    Args:
        like: A tensor whose type and device the mask takes.

    Source: the paper, section 3.3 "Token masking". Additive, because a 4-D boolean mask is misread by eager attention.
    """
    hidden = torch.rand(batch, 1, 1, positions, device=like.device) < probability
    future = torch.ones(positions, positions, dtype=torch.bool, device=like.device).triu(1)
    itself = torch.eye(positions, dtype=torch.bool, device=like.device)
    blocked = (hidden | future) & ~itself
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(blocked.shape, dtype=like.dtype, device=like.device).masked_fill(blocked, lowest)


def _reset_head(head: nn.Linear, config: AutoregressiveConfig) -> None:
    """Start as one standard Gaussian, whatever the trunk's output.

    The components' locations are spread a little: components that start equal get equal gradients for ever.
    """
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    shape = (config.components, 2, config.token_dim)
    with torch.no_grad():
        locations = head.bias[config.components :].view(shape)[:, 0]
        locations.copy_(torch.randn(locations.shape) * LOCATION_SPREAD * (config.components > 1))


def _add_residual_dropout(trunk: LlamaModel, probability: float) -> None:
    """Drop numbers of each branch before it joins the residual stream; transformers' LLaMA has no such option."""

    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, probability, module.training)

    for layer in trunk.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def save_autoregressive(model: AutoregressiveModel, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write model.safetensors, which holds all that loading needs, and config.json for readers.

    Args:
        model: What is saved; in float32, whatever it was computed in.
        folder: That of the files.
        weights: The state dict of a model that is sharded.
    """
    weights = model.state_dict() if weights is None else weights
    config = asdict(model.config)
    # One key: the file format keeps several in no particular order, and bytes should be the same each time.
    header = {METADATA_KEY: json.dumps({"config": config, "tokenizer": model.tokenizer.to_str()}, sort_keys=True)}
    whole = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(whole, folder / "model.safetensors", metadata=header)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_autoregressive(path: Path, device: str = "cpu", precision: Precision = "float32") -> AutoregressiveModel:
    """Load the model.safetensors that `save_autoregressive` wrote, in evaluation mode.

    Args:
        path: The file.
        device: Where it goes.
        precision: Of the trunk's weights; all else, the mixture head too, stays in float32.

    Raises:
        AutoregressiveError: The file holds no story model.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {})[METADATA_KEY])
    except (SafetensorError, KeyError, OSError) as error:
        raise AutoregressiveError(f"{path} holds no story model ({error!r}): run `moviedreamer train`") from None
    config = AutoregressiveConfig(**header["config"])
    tokenizer = Tokenizer.from_str(header["tokenizer"])
    with torch.device("meta"):  # no memory, and no time, for weights that are replaced at once
        model = AutoregressiveModel(config, build_language_model(config.trunk), tokenizer)
    # The frequencies of rotary positions are in no file.
    model.trunk.rotary_emb = type(model.trunk.rotary_emb)(model.trunk.config)
    model.load_state_dict(load_file(path), assign=True)
    if precision == "bfloat16":
        halve_trunk(model)
    return model.eval().to(device)


def halve_trunk(model: AutoregressiveModel) -> AutoregressiveModel:
    """Put the trunk's weights into bfloat16; all else stays in float32.

    Weights alone: `.to(torch.bfloat16)` would round the frequencies of the rotary embedding as well, and far positions
    would be off by whole turns.
    """
    for parameter in model.trunk.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model
