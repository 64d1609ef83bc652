"""Dreams a story up: from its scripts to the tokens of every keyframe.

Zero-shot from the scripts alone; few-shot when reference pictures are given; or as the continuation of an ingested
film, whose last keyframes then come before the story's first. Stories may be longer than the model's window: a fresh
one starts then, or the oldest keyframe falls out. On an accelerator the trunk samples in bfloat16, the mixture head in
float32.

Source: the paper, section 3.3 (equation 5, "Few-shot training for personalized generation") and appendix A.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from models import weights
from models.script import FrameScript, ScriptError, Story, StoryCharacter, StoryFrame, load_story
from stages.errors import MissingInputError, MoviedreamerError, StoryError
from stages.face_choice import FaceChoice
from stages.spec import Inputs, Progress, StageConfig, StageSpec, neutral

if TYPE_CHECKING:
    from models.autoregressive import AutoregressiveModel
    from models.generation import Prompt
    from models.sequence import Frame
    from models.token_table import TokenTable


class DreamConfig(StageConfig):
    """Settings of the dream stage."""

    window_frames: int = Field(128, ge=2, description="most keyframes that the model sees at once")
    overlap_frames: int = Field(16, ge=0, description="keyframes that a fresh window takes over; less than a window")
    window: Literal["restart", "slide"] = Field(
        "restart",
        description="what a full window does: `restart` with the overlap, as in the paper, or `slide`: the oldest goes",
    )
    sink_frames: int = Field(1, ge=1, description="first keyframes that never fall out of a sliding window")
    max_references: int = Field(10, ge=0, description="reference pictures used, the first ones given")
    continue_film: str | None = Field(None, description="id of the ingested film that the story goes on from")
    temperature: float = Field(0.95, ge=0, description="factor of the standard deviations when sampling")
    guidance: float = Field(0, ge=0, description="how much more the script counts than without guidance; 0 for none")
    text_encoder: str = Field("minilm_l6", description="as in the tokenize stage")
    face_models: FaceChoice = Field(FaceChoice(), description="as `models` of the faces stage")
    min_face_score: float = Field(0.5, ge=0, le=1, description="score from which a character's picture shows a face")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the language model's weights; the mixture head stays float32"
    )
    seed: int = Field(0, ge=0, description="of everything random")
    batch_stories: int = neutral(16, "stories dreamed at once, of those asked for together; each takes memory", ge=1)

    def subjects_at_once(self) -> int:
        """Several stories are one batch."""
        return self.batch_stories

    @model_validator(mode="after")
    def _check_window(self) -> "DreamConfig":
        most = self.window_frames - 1
        if self.overlap_frames > most:
            raise ValueError(f"overlap_frames {self.overlap_frames}: expected at most window_frames - 1 = {most}")
        if self.window == "slide" and self.sink_frames >= most:
            raise ValueError(f"sink_frames {self.sink_frames}: expected at most window_frames - 2 = {most - 1}")
        return self

    def weights(self) -> tuple[str, ...]:
        """Of sentences and faces."""
        return tuple(dict.fromkeys((self.text_encoder, *self.face_models.weights())))

    def recipe(self) -> dict[str, Any]:
        """Weights enter by what they hold, not by where they lie."""
        values = weights.without_places(super().recipe(), "text_encoder")
        return values | {"face_models": self.face_models.recipe()}


SPEC = StageSpec(
    name="dream",
    version=1,
    implementation="stages.dream:Dream",
    inputs=("story", "autoregressive", "autoencoder", "tokens"),
    output="dream",
    scope="set",
    cpus=2,
    gpus=1,
    description="Story scripts to keyframe tokens; also reads the role `references` where given",
)

SCHEMA = pa.schema(
    [
        ("frame_index", pa.int64()),
        ("shot_index", pa.int32()),
        ("script", pa.string()),
        ("tokens", pa.list_(pa.float32())),
        ("sentence_embeddings", pa.list_(pa.float32())),
        ("face_embeddings", pa.list_(pa.float32())),
    ]
)
"""Lists of numbers are flat; one face for each character of the frame that has one."""


class Dream:
    """Writes `dream.parquet`, one row a keyframe to make."""

    def __init__(self, config: DreamConfig, weights_dir: Path | None = None) -> None:
        import torch

        from models.text_encoder import open_sentence_encoder

        self._config, self._weights_dir = config, weights_dir
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._text_encoder = open_sentence_encoder(weights.locate(config.text_encoder, weights_dir), self._device)

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Sample the tokens of the story's keyframes.

        Args:
            inputs: `story` (one JSON file, beside it the pictures that it names), `autoregressive`, `autoencoder`,
                `tokens` (for characters of an ingested film, and for going on from one), and `references`
                (pictures) where wanted.
            out: Where `dream.parquet` goes.
            scratch: Not used.
            progress: Told after each keyframe.

        Returns:
            `frames`, `mode` ("zero-shot", "few-shot", "continue" or "continue few-shot"), `references`, `history`.

        Raises:
            StoryError: The story, a face or a reference picture cannot be used.
            MissingInputError: The model or the tokens of a film that is named are not there.
        """
        (came,) = self.together([(inputs, out)], progress)
        if isinstance(came, Exception):
            raise came
        return came

    def together(
        self, jobs: Sequence[tuple[Inputs, Path]], progress: Progress
    ) -> list[dict[str, Any] | MoviedreamerError]:
        """`__call__` for several stories at once: those that one model is to dream are one batch.

        Returns:
            For each story its summary, or the error that concerns it alone.
        """
        from models.autoregressive import load_autoregressive
        from models.generation import Prompt, Sampling, generate_many

        came: list[dict[str, Any] | MoviedreamerError] = [{} for _ in jobs]
        opened: dict[tuple[Path, ...], dict[int, tuple[Story, list[np.ndarray]]]] = {}
        for index, (inputs, _) in enumerate(jobs):
            try:
                story, shared = _read_story(inputs), (_find_model(inputs), *map(Path.resolve, inputs.get("tokens", [])))
                references = self._encode_references(inputs)  # before the story model takes the memory
                opened.setdefault(shared, {})[index] = story, references
            except MoviedreamerError as error:
                came[index] = error
        sampling = Sampling(**{name: getattr(self._config, name) for name in Sampling.__dataclass_fields__})
        for (model_file, *_), stories in opened.items():
            model = load_autoregressive(model_file, self._device, self._config.precision)
            table = self._load_table(jobs[min(stories)][0])
            prompts: dict[int, Prompt] = {}
            for index, (story, references) in stories.items():
                try:
                    frames, history = self._build_frames(story, model, table), self._continue_from(table, model)
                    prompts[index] = Prompt(frames, history, references, self._config.seed)
                except MoviedreamerError as error:
                    came[index] = error
            tokens = generate_many(
                model,
                list(prompts.values()),
                sampling,
                lambda done, total: progress(done, total, f"keyframe {done} of {total}"),
            )
            for (index, prompt), made in zip(prompts.items(), tokens, strict=True):
                came[index] = _write_dream(stories[index][0], prompt, made, jobs[index][1])
        return came

    def _load_table(self, inputs: Inputs) -> "TokenTable | None":
        from models.token_table import TokenTable

        paths = inputs.get("tokens", [])
        return TokenTable(paths[0].parent) if paths else None

    def _build_frames(self, story: Story, model: "AutoregressiveModel", table: "TokenTable | None") -> "list[Frame]":
        """The story's keyframes with embedded sentences and faces."""
        from models.sequence import Frame

        faces = {character.identity: self._find_face(character, table) for character in story.characters}
        _check_width("face", {face.shape[0] for face in faces.values() if face is not None}, model.config.face_width)
        _check_width("sentence", {self._text_encoder.width}, model.config.text_width)
        sentences = [sentence for frame in story.frames for sentence in frame.sentences()]
        embeddings = iter(self._text_encoder.encode(sentences))
        frames = []
        for script in story.frames:
            own = np.asarray(list(itertools.islice(embeddings, len(script.sentences()))), np.float32)
            shown = {p: faces[c.identity] for p, c in enumerate(script.characters) if faces[c.identity] is not None}
            frames.append(Frame(script.layout(), own, shown))
        return frames

    def _find_face(self, character: StoryCharacter, table: "TokenTable | None") -> np.ndarray | None:
        """The conditioning embedding of a character's face, float32 [width]; None where the story gives no face."""
        if character.face is not None:
            return self.embed_face(Path(character.face))
        if character.film is None:
            return None
        film, index = character.film, character.character_index
        table = _checked_table(table, film, f"character {character.identity!r}")
        faces = [table.face(*place) for place in table.faces_of(film, index)]
        if not faces:
            raise StoryError(
                f"character {character.identity!r}: film {film!r} has no face of character {index}: "
                f"expected one of {table.characters(film)}"
            )
        # The face nearest to all others: a real one, which their mean need not be.
        stacked = np.stack(faces)
        return stacked[np.argmin(np.linalg.norm(stacked[:, None] - stacked[None], axis=-1).sum(1))]

    def embed_face(self, path: Path) -> np.ndarray:
        """The conditioning embedding of the clearest face in a picture, float32 [width], of unit length.

        Raises:
            StoryError: The picture cannot be read or shows no face.
        """
        from models.face_embedder import align_face

        models = self._config.face_models.open(self._weights_dir)
        picture = _read_picture(path)
        found = models.detect(picture, self._config.min_face_score)
        if not len(found):
            raise StoryError(f"{path}: no face found: give a picture that shows the character's face from the front")
        return models.describe([align_face(picture, found.landmarks[0])])[0]

    def _continue_from(self, table: "TokenTable | None", model: "AutoregressiveModel") -> "list[Frame]":
        """The last keyframes of the film to go on from, with scripts and tokens."""
        film = self._config.continue_film
        if film is None:
            return []
        table = _checked_table(table, film, "dream.continue_film")
        _check_width("token", {table.widths["token_dim"]}, model.config.token_dim)
        rng = np.random.default_rng(self._config.seed)
        rows = table.rows_of(film)
        return [table.frame(row, rng) for row in rows[max(0, len(rows) - self._config.overlap_frames) :]]

    def _encode_references(self, inputs: Inputs) -> list[np.ndarray]:
        """Tokens of the reference pictures."""
        paths = inputs.get("references", [])[: self._config.max_references]
        if not paths:
            return []
        import torch

        from models.autoencoder import load_autoencoder

        pictures = [torch.from_numpy(_read_picture(path)).permute(2, 0, 1)[None].float() / 255 for path in paths]
        autoencoder = load_autoencoder(inputs["autoencoder"], self._weights_dir, self._device)
        return [autoencoder.encode(picture.to(self._device))[0].cpu().numpy() for picture in pictures]


def _find_model(inputs: Inputs) -> Path:
    """The story model's file itself: the same for all stories that it is to dream."""
    path = next((path for path in inputs.get("autoregressive", []) if path.suffix == ".safetensors"), None)
    if path is None:
        raise MissingInputError("there is no trained story model: run `moviedreamer train` first")
    return path.resolve()


def _read_story(inputs: Inputs) -> Story:
    try:
        return load_story(next(path for path in inputs["story"] if path.suffix == ".json"))
    except ScriptError as error:
        raise StoryError(str(error)) from error


def _read_picture(path: Path) -> np.ndarray:
    """RGB uint8 [height, width, 3].

    Raises:
        StoryError: It is no picture.
    """
    from models.pictures import PictureError, decode_picture, read_picture_file

    try:
        picture = decode_picture(read_picture_file(path))
    except PictureError as error:
        raise StoryError(str(error)) from error
    if picture is None:
        raise StoryError(f"{path}: cannot be read as a picture by OpenCV: give a JPEG or PNG file")
    return picture


def _checked_table(table: "TokenTable | None", film: str, what: str) -> "TokenTable":
    if table is None:
        raise MissingInputError(
            f"{what} names film {film!r}, but no film was tokenized: run `moviedreamer train` first"
        )
    if not table.rows_of(film):
        known = ", ".join(sorted(set(table.films))[:20])
        raise StoryError(f"{what} names film {film!r}, which was not ingested: expected one of {known}")
    return table


def _check_width(what: str, found: set[int], expected: int) -> None:
    if wrong := found - {expected}:
        raise MissingInputError(
            f"{what} embeddings of {wrong.pop()} numbers do not fit the story model, which takes {expected}: "
            "train it again with this profile"
        )


def _write_dream(story: Story, prompt: "Prompt", tokens: np.ndarray, out: Path) -> dict[str, Any]:
    """Write dream.parquet; returns what is told of it."""
    told = zip(itertools.count(), story.shot_indices(), story.frames, prompt.frames, tokens)
    rows = [_row(*values) for values in told]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out / "dream.parquet", compression="zstd")
    mode = [word for word, given in (("continue", prompt.history), ("few-shot", prompt.references)) if given]
    return {
        "frames": len(rows),
        "mode": " ".join(mode) or "zero-shot",
        "references": len(prompt.references),
        "history": len(prompt.history),
    }


def _row(index: int, shot: int, script: StoryFrame, frame: "Frame", tokens: np.ndarray) -> dict[str, Any]:
    faces = [frame.faces[position] for position in sorted(frame.faces)]
    plain = FrameScript(characters=script.characters, scene_elements=script.scene_elements, plot=script.plot)
    return {
        "frame_index": index,
        "shot_index": shot,
        "script": plain.model_dump_json(),
        "tokens": tokens.ravel(),
        "sentence_embeddings": frame.sentences.ravel(),
        "face_embeddings": np.concatenate(faces) if faces else np.empty(0, np.float32),
    }
