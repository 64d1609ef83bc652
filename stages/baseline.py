"""What other systems make of a story, in the shape of this one's pictures, for the same stages to score and animate.

Four systems that need no training: SDXL frame by frame, without memory; SDXL with StoryDiffusion's consistent
self-attention; Stable Video Diffusion, clip after clip from each last frame; and FreeNoise, one long video from text.
Of the videos, the frames at the times of the story's keyframes are kept.

Source: section 4.2 of the paper, which compares with StoryDiffusion and FreeNoise; the four papers for each system.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from models import weights
from models.script import FrameScript, ScriptError, Story, load_story
from stages.errors import MissingInputError, StoryError, UsageError
from stages.render import PICTURES_SCHEMA
from stages.spec import Inputs, Progress, StageConfig, StageSpec, no_progress

if TYPE_CHECKING:
    from models.baseline_prompts import Prompt
    from models.diffusers_pipelines import Sampling
    from models.picture_folder import PictureFolder

Method = Literal["frame_by_frame", "consistent_attention", "svd_chain", "freenoise"]


@dataclass(frozen=True)
class Usual:
    """What a system is usually sampled with."""

    steps: int
    guidance: float
    width_px: int
    height_px: int


USUAL: dict[Method, Usual] = {
    "frame_by_frame": Usual(50, 5.0, 1024, 576),
    "consistent_attention": Usual(50, 5.0, 1024, 576),
    "svd_chain": Usual(25, 3.0, 1024, 576),
    "freenoise": Usual(50, 7.5, 576, 320),
}
"""Steps and guidance of SDXL as in StoryDiffusion, of the videos as in diffusers; sizes near 16:9."""

COMMON_FIELDS = (
    "method", "sampling_steps", "guidance", "width_px", "height_px", "seed", "jpeg_quality", "precision",
)  # fmt: skip
FIELDS: dict[Method, tuple[str, ...]] = {
    "frame_by_frame": ("sdxl",),
    "consistent_attention": ("sampling_rate", "window_pictures", "overlap_pictures", "sdxl"),
    "svd_chain": ("seconds_per_keyframe", "first_picture", "svd", "sdxl"),
    "freenoise": ("seconds_per_keyframe", "stable_diffusion", "motion_adapter"),
}
"""Settings that matter to a system, beside those that matter to all."""


class BaselineConfig(StageConfig):
    """Settings of the systems that are compared with."""

    method: Method | None = Field(None, description="the system; the command `baseline` sets it")
    sampling_steps: int | None = Field(None, ge=1, description="steps of the sampler; null for the system's usual")
    guidance: float | None = Field(None, ge=0, description="scale of the guidance; null for the system's usual")
    width_px: int | None = Field(None, ge=16, multiple_of=8, description="of the pictures; null for the usual")
    height_px: int | None = Field(None, ge=16, multiple_of=8, description="of the pictures; null for the usual")
    seed: int = Field(0, ge=0, description="of everything random")
    jpeg_quality: int = Field(95, ge=1, le=100, description="of the pictures")
    sampling_rate: float = Field(
        0.5, ge=0, le=1, description="consistent_attention: share of the other pictures' tokens that are looked at"
    )
    window_pictures: int = Field(12, ge=2, description="consistent_attention: pictures sampled together")
    overlap_pictures: int = Field(
        4, ge=1, description="consistent_attention: pictures that a window takes over; less than a window"
    )
    seconds_per_keyframe: float = Field(
        1.25, ge=0.2, le=60, description="svd_chain, freenoise: time from keyframe to keyframe in their videos"
    )
    first_picture: Literal["sdxl", "given"] = Field(
        "sdxl", description="svd_chain: made of the first script by SDXL, or given with the command"
    )
    precision: Literal["float16", "float32"] = Field(
        "float16", description="of the models, without SDXL's VAE, which overflows in half; float16 is slow on a CPU"
    )
    sdxl: str = Field("sdxl", description="SDXL's name in the table of weights, or a folder")
    svd: str = Field("svd_xt", description="Stable Video Diffusion's name, or a folder")
    stable_diffusion: str = Field("sd15", description="freenoise: Stable Diffusion 1.5's name, or a folder")
    motion_adapter: str = Field("animatediff_v15_2", description="freenoise: AnimateDiff's name, or a folder")

    @model_validator(mode="after")
    def _require_new_pictures(self) -> "BaselineConfig":
        if self.overlap_pictures >= self.window_pictures:
            raise ValueError(
                f"overlap_pictures {self.overlap_pictures} leaves no new picture in a window of "
                f"{self.window_pictures}: use fewer than window_pictures"
            )
        return self

    def is_heavy(self) -> bool:
        """All of the systems want an accelerator."""
        return True

    def weights(self) -> tuple[str, ...]:
        """Of the system; none where no system is chosen."""
        match self.method:
            case None:
                return ()
            case "svd_chain":
                return (self.svd,) if self.first_picture == "given" else (self.svd, self.sdxl)
            case "freenoise":
                return (self.stable_diffusion, self.motion_adapter)
        return (self.sdxl,)

    def recipe(self) -> dict[str, Any]:
        """What matters to the system; weights enter by what they hold, not by where they lie."""
        matters = {*COMMON_FIELDS, *(FIELDS[self.method] if self.method else ())}
        if self.method == "svd_chain" and self.first_picture == "given":
            matters.remove("sdxl")
        chosen = {name: value for name, value in super().recipe().items() if name in matters}
        return weights.without_places(chosen, "sdxl", "svd", "stable_diffusion", "motion_adapter")

    def sampling(self, method: Method) -> "Sampling":
        """How a system is sampled: as set, otherwise as it usually is."""
        from models.diffusers_pipelines import Sampling

        usual = USUAL[method]
        return Sampling(
            usual.steps if self.sampling_steps is None else self.sampling_steps,
            usual.guidance if self.guidance is None else self.guidance,
            self.width_px or usual.width_px,
            self.height_px or usual.height_px,
            self.seed,
        )


SPEC = StageSpec(
    name="baseline",
    version=2,
    implementation="stages.baseline:Baseline",
    inputs=("story",),
    output="pictures",
    scope="set",
    cpus=2.0,
    gpus=1.0,
    description="a story's pictures by another system; also reads the role `references` where a first picture is given",
)


class Baseline:
    """The job: a story in; pictures.parquet out, and prompts.json with what each frame's text was and what it lost."""

    def __init__(self, config: BaselineConfig, weights_dir: Path | None = None):
        self.config = config
        self.weights_dir = weights_dir

    def __call__(self, inputs: Inputs, out: Path, scratch: Path, progress: Progress) -> dict[str, Any]:
        """Paint the story's frames, in order.

        Args:
            inputs: `story` (one JSON file), and `references` (one picture) for an SVD chain from a given picture.
            out: Where the files go.
            scratch: Keeps finished pictures; a killed run goes on behind them.
            progress: Told after each step of sampling.

        Returns:
            `method`, `pictures`, `width_px`, `height_px`, `steps`, `guidance`, `prompts_cut` (frames whose text did
            not fit into CLIP's 77 positions).

        Raises:
            UsageError: No system is chosen.
            StoryError: The story cannot be used, is too long for freenoise, or the first picture is none.
            MissingInputError: A first picture is to be given, and is not.
            WeightsError: Weights are absent, or a part of them.
        """
        from models.picture_folder import PictureFolder

        method = self.config.method
        if method is None:
            raise UsageError(f"baseline.method is null: expected one of {', '.join(USUAL)}")
        story = _read_story(inputs)
        sampling = self.config.sampling(method)
        pictures = PictureFolder(scratch, self.config.jpeg_quality)
        paint = {
            "frame_by_frame": self._paint_frames,
            "consistent_attention": self._paint_consistently,
            "svd_chain": self._chain_clips,
            "freenoise": self._paint_video,
        }[method]
        prompts = paint(story, sampling, pictures, inputs, progress)
        size = {"width_px": sampling.width_px, "height_px": sampling.height_px}
        _write_pictures(out / "pictures.parquet", story, pictures, size)
        told = [{"frame_index": i, "prompt": p.text, "left_out": list(p.left_out)} for i, p in enumerate(prompts)]
        (out / "prompts.json").write_text(json.dumps(told, indent=1) + "\n")
        return {
            "method": method,
            "pictures": len(story.frames),
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "prompts_cut": sum(bool(prompt.left_out) for prompt in prompts),
            **size,
        }

    def _paint_frames(
        self, story: Story, sampling: "Sampling", pictures: "PictureFolder", inputs: Inputs, progress: Progress
    ) -> "list[Prompt]":
        from models.sdxl_pictures import load_sdxl, paint_frame_by_frame

        pipeline = load_sdxl(self._locate(self.config.sdxl), self.config.precision)
        prompts = _write_prompts(story, pipeline)
        paint_frame_by_frame(pipeline, [prompt.text for prompt in prompts], sampling, pictures, progress)
        return prompts

    def _paint_consistently(
        self, story: Story, sampling: "Sampling", pictures: "PictureFolder", inputs: Inputs, progress: Progress
    ) -> "list[Prompt]":
        from models.consistent_attention import Consistency, paint_consistently
        from models.sdxl_pictures import load_sdxl

        config = self.config
        pipeline = load_sdxl(self._locate(config.sdxl), config.precision)
        prompts = _write_prompts(story, pipeline, characters_first=True)
        consistency = Consistency(config.sampling_rate, config.window_pictures, config.overlap_pictures)
        texts = [prompt.text for prompt in prompts]
        paint_consistently(pipeline, texts, sampling, consistency, pictures, progress)
        return prompts

    def _chain_clips(
        self, story: Story, sampling: "Sampling", pictures: "PictureFolder", inputs: Inputs, progress: Progress
    ) -> "list[Prompt]":
        from models.svd_chain import chain_clips, load_svd, place_keyframes

        first, prompts = self._first_picture(story, pictures.folder, inputs)
        pipeline = load_svd(self._locate(self.config.svd), self.config.precision)
        clip_frames = pipeline.unet.config.num_frames
        places = place_keyframes(len(story.frames), self.config.seconds_per_keyframe, clip_frames)
        chain_clips(pipeline, first, places, sampling, pictures, progress)
        return prompts

    def _first_picture(self, story: Story, scratch: Path, inputs: Inputs) -> "tuple[bytes, list[Prompt]]":
        """The picture that the chain starts from, and the prompt that it was made of."""
        if self.config.first_picture == "given":
            if not inputs.get("references"):
                raise MissingInputError("baseline.first_picture is given, but no picture is: name one with --first")
            (path,) = inputs["references"]
            require_picture(path)
            return path.read_bytes(), []
        from models.picture_folder import PictureFolder
        from models.sdxl_pictures import load_sdxl, paint_frame_by_frame

        pipeline = load_sdxl(self._locate(self.config.sdxl), self.config.precision)
        prompts = _write_prompts(story, pipeline)[:1]
        painted = PictureFolder(scratch / "first", self.config.jpeg_quality)
        usual = USUAL["frame_by_frame"]
        sampling = replace(self.config.sampling("svd_chain"), steps=usual.steps, guidance=usual.guidance)
        paint_frame_by_frame(pipeline, [prompts[0].text], sampling, painted, no_progress)
        return painted.read(0), prompts

    def _paint_video(
        self, story: Story, sampling: "Sampling", pictures: "PictureFolder", inputs: Inputs, progress: Progress
    ) -> "list[Prompt]":
        from models.free_noise import load_free_noise, paint_video, place_keyframes

        config = self.config
        try:
            places = place_keyframes(len(story.frames), config.seconds_per_keyframe)
        except ValueError as error:
            raise StoryError(f"{error}: lower baseline.seconds_per_keyframe, or shorten the story") from None
        folders = self._locate(config.stable_diffusion), self._locate(config.motion_adapter)
        pipeline = load_free_noise(*folders, config.precision)
        prompts = _write_prompts(story, pipeline)
        paint_video(pipeline, [prompt.text for prompt in prompts], places, sampling, pictures, progress)
        return prompts

    def _locate(self, name: str) -> Path:
        return weights.locate(name, self.weights_dir)


def require_picture(path: Path) -> None:
    """Decode a picture that a chain is to start from, before anything is loaded for it.

    Raises:
        StoryError: It is no picture, or not a whole one.
    """
    from models.pictures import PictureError, read_picture_file

    try:
        read_picture_file(path)
    except PictureError as error:
        raise StoryError(str(error)) from error


def _read_story(inputs: Inputs) -> Story:
    path = next((path for path in inputs.get("story", ()) if path.suffix == ".json"), None)
    if path is None:
        raise MissingInputError("stage baseline needs a story: run `moviedreamer baseline METHOD --story STORY.json`")
    try:
        return load_story(path)
    except ScriptError as error:
        raise StoryError(str(error)) from error


def _write_prompts(story: Story, pipeline: Any, characters_first: bool = False) -> "list[Prompt]":
    from models.baseline_prompts import write_prompts
    from models.diffusers_pipelines import count_tokens

    return write_prompts(story, lambda text: count_tokens(pipeline, text), characters_first)


def _write_pictures(path: Path, story: Story, pictures: "PictureFolder", size: dict[str, int]) -> None:
    """The rows that the render stage would write."""
    rows = []
    for index, (frame, shot) in enumerate(zip(story.frames, story.shot_indices(), strict=True)):
        script = FrameScript(characters=frame.characters, scene_elements=frame.scene_elements, plot=frame.plot)
        row = {"frame_index": index, "shot_index": shot, "script": script.model_dump_json()}
        rows.append(row | {"jpeg": pictures.read(index)} | size)
    pq.write_table(pa.Table.from_pylist(rows, schema=PICTURES_SCHEMA), path)
