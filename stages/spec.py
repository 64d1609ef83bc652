"""The contract between a stage and the engine that runs it.

A stage file holds, in this order: what it does and where the paper describes it; its `Config`; its `SPEC`; and
the class that does the work. There are two shapes of work:

* An *item stage* turns rows into rows: `Stage(config, weights_dir)(keyframes=[...], people=[...])` yields exactly
  one `Outcome` for each row (item) of its first input.
* A *job* turns files into files: `Stage(config, weights_dir)(inputs, out, scratch, progress)` writes its results
  into `out`, may keep checkpoints in `scratch` (which outlives a killed run), and returns a summary. One that takes
  several subjects at once (`StageConfig.subjects_at_once`) also has `together(jobs, progress)`: for each pair of
  `(inputs, out)` it gives, in their order, the summary or the exception that concerns this subject alone.

Neither knows storage, Prefect or Ray.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

Row = dict[str, Any]
Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, message)`; cheap enough to be called once a step."""

Inputs = Mapping[str, list[Path]]
"""Role (an artifact kind) to the local paths of its files, in a stable order."""


def no_progress(done: int, total: int, message: str) -> None:
    """A `Progress` that shows nothing."""


class StageConfig(BaseModel):
    """Base of every stage's settings: immutable, unknown fields refused.

    A field declared with `neutral()` changes how fast or where a stage runs, never its result, and so stays out
    of the fingerprint.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    time_limit_s: float | None = Field(
        None,
        gt=0,
        description="seconds after which a unit's worker is stopped; none: an hour for item stages, no limit for jobs",
        json_schema_extra={"neutral": True},
    )

    gpus: float | None = Field(
        None,
        ge=0,
        description="accelerators a worker asks for, where there are any; none: one where its models are large",
        json_schema_extra={"neutral": True},
    )

    def is_heavy(self) -> bool:
        """Whether these settings choose models that want an accelerator of their own."""
        return False

    def starts_processes(self) -> bool:
        """Whether a job under these settings starts processes that ask for cores and accelerators themselves."""
        return False

    def subjects_at_once(self) -> int:
        """Most subjects that a worker takes at once of a job under these settings."""
        return 1

    def weights(self) -> tuple[str, ...]:
        """Weights that these settings need: names in `models.weights.TABLE`, or paths of the user's own."""
        return ()

    def recipe_weights(self) -> tuple[str, ...]:
        """Those of the weights that change results."""
        return self.weights()

    def recipe(self) -> dict[str, Any]:
        """The settings that change results, as plain JSON values."""
        neutral = {
            name
            for name, info in type(self).model_fields.items()
            if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("neutral")
        }
        return self.model_dump(mode="json", exclude=neutral)


def neutral(default: Any, description: str, **constraints: Any) -> Any:
    """Declare a config field that does not change results."""
    return Field(default, description=description, json_schema_extra={"neutral": True}, **constraints)


@dataclass(frozen=True, slots=True)
class Ok:
    """An item that worked: its output rows, possibly none, possibly produced lazily."""

    item: str
    rows: Iterable[Row]


@dataclass(frozen=True, slots=True)
class Skip:
    """An item that was looked at and rightly left out, with a short snake_case reason such as `no_person`."""

    item: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """An item that could not be processed, with an error that names the value and the remedy."""

    item: str
    error: str
    retryable: bool = False


Outcome = Ok | Skip | Fail


@dataclass(frozen=True)
class StageSpec:
    """What the engine must know of a stage.

    Attributes:
        name: The stage's name, also its section in a profile.
        version: A number that the author raises when results change.
        implementation: `module:Class` of the work, imported only where it runs.
        inputs: Artifact kinds it reads; the first is the one whose rows are its items.
        output: The artifact kind it writes.
        schema: Columns of the output; None for a job, which writes files of its own.
        key: Columns of the first input that together identify an item.
        scope: `part`: a worker takes one part file of the first input at once, and an item's outcome depends on its
            own row and the other inputs' rows of its frame alone; `film`: all of a film at once; `set`: all subjects
            together (jobs).
        cpus: Cores a worker asks for.
        gpus: Accelerators a worker asks for where the machine has any.
    """

    name: str
    version: int
    implementation: str
    inputs: tuple[str, ...]
    output: str
    schema: pa.Schema | None = None
    key: tuple[str, ...] = ("frame_index",)
    scope: Literal["part", "film", "set"] = "part"
    cpus: float = 1.0
    gpus: float = 0.0
    description: str = field(default="", compare=False)

    def load(self) -> type:
        """Import the class that does the work."""
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)

    def gpus_for(self, config: StageConfig) -> float:
        """Accelerators a worker asks for under some settings."""
        own = max(self.gpus, float(config.is_heavy()))
        return own if config.gpus is None else config.gpus

    def item_of(self, row: Row) -> str:
        """The identity of an input row within its film, for example `42` or `42-1`."""
        return "-".join(str(row[column]) for column in self.key)
