"""Profiles: complete named settings, made of the stages' own configs. Load, override, explain.

The only file that reads the environment. Importing it imports every stage's `Config` and `SPEC`, but no torch.
"""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from models.weights import TABLE, WeightsError, missing_files
from stages.animate import AnimateConfig
from stages.baseline import BaselineConfig
from stages.captions import CaptionsConfig
from stages.dream import DreamConfig
from stages.errors import ProfileError
from stages.evaluate import EvaluateConfig
from stages.faces import FacesConfig
from stages.features import FeaturesConfig
from stages.identities import IdentitiesConfig
from stages.keyframes import KeyframesConfig
from stages.people import PeopleConfig
from stages.render import RenderConfig
from stages.score import ScoreConfig
from stages.scripts import ScriptsConfig
from stages.shards import ShardsConfig
from stages.spec import StageConfig, StageSpec
from stages.tokenize import TokenizeConfig
from stages.train_autoencoder import TrainAutoencoderConfig
from stages.train_autoregressive import TrainAutoregressiveConfig
from stages.train_renderer import TrainRendererConfig

PROFILES_DIR = Path(__file__).parent / "profiles"


class EngineConfig(BaseModel):
    """Where units run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    executor: Literal["ray", "inline"] = Field("ray", description="`ray` actors, or one after the other in the process")
    ray_address: str | None = Field(None, description="host:port of a Ray cluster; none starts Ray on this machine")
    cpus: int | None = Field(None, ge=1, description="cores for a Ray on this machine; none takes all")
    weights_dir: Path | None = Field(None, description="folder of weights; none is ~/.cache/moviedreamer/weights")
    max_concurrent: int | None = Field(None, ge=1, description="most units at once; none takes what the cores allow")
    metrics_address: str | None = Field(
        None, pattern=r"^[^:]*:\d+$", description="host:port where Prometheus reads metrics while a run goes on"
    )
    failure_budget: float | None = Field(
        0.05, ge=0, le=1, description="share of films that may fail before a backfill stops; none for any"
    )

    @field_validator("weights_dir")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path else None


class GenerateConfig(BaseModel):
    """The story that `run` makes up where none is given: scenes retold from the films' own scripts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenes: int = Field(4, ge=1, description="shots of the made-up story")
    frames_per_scene: int = Field(3, ge=1, description="keyframes in each of them")


class RetrainConfig(BaseModel):
    """When a newly trained model takes over."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    margin: float = Field(
        0.0, ge=0, description="by how much a model's mean reciprocal rank has to exceed the champion's"
    )


class Profile(BaseModel):
    """All settings of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "paper"
    engine: EngineConfig = EngineConfig()
    generate: GenerateConfig = GenerateConfig()
    retrain: RetrainConfig = RetrainConfig()
    keyframes: KeyframesConfig = KeyframesConfig()
    people: PeopleConfig = PeopleConfig()
    faces: FacesConfig = FacesConfig()
    identities: IdentitiesConfig = IdentitiesConfig()
    captions: CaptionsConfig = CaptionsConfig()
    scripts: ScriptsConfig = ScriptsConfig()
    shards: ShardsConfig = ShardsConfig()
    features: FeaturesConfig = FeaturesConfig()
    train_autoencoder: TrainAutoencoderConfig = TrainAutoencoderConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    train_renderer: TrainRendererConfig = TrainRendererConfig()
    train_autoregressive: TrainAutoregressiveConfig = TrainAutoregressiveConfig()
    score: ScoreConfig = ScoreConfig()
    dream: DreamConfig = DreamConfig()
    render: RenderConfig = RenderConfig()
    animate: AnimateConfig = AnimateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    baseline: BaselineConfig = BaselineConfig()

    def config(self, spec: StageSpec) -> StageConfig:
        """The settings of a stage."""
        return getattr(self, spec.name)

    def weights(self, stages: Iterable[str] | None = None) -> list[str]:
        """Names of all weights that these settings need, for some stages or for all."""
        configs = [getattr(self, name) for name in (type(self).model_fields if stages is None else stages)]
        return sorted({name for config in configs if isinstance(config, StageConfig) for name in config.weights()})


class ExplainedProfile:
    """A profile, and for each field where its value came from.

    Args:
        profile: The name of a profile that ships with the project, or the path of a YAML file. A file may name
            another profile as its `base`.
        overrides: `section.field=value` settings, values in YAML.

    Raises:
        ProfileError: A name, field or value is wrong; the message says which, and what was expected.
    """

    def __init__(self, profile: str, overrides: tuple[str, ...] = ()) -> None:
        self.origins: dict[str, str] = {}
        values = self._read(profile)
        for override in overrides:
            self._apply(values, override)
        try:
            self.profile = Profile.model_validate(values)
        except ValidationError as error:
            raise ProfileError(_explain(error, self.origins)) from None

    def _read(self, profile: str) -> dict[str, Any]:
        path = PROFILES_DIR / f"{profile}.yaml" if (PROFILES_DIR / f"{profile}.yaml").is_file() else Path(profile)
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in PROFILES_DIR.glob("*.yaml")))
            raise ProfileError(f"no profile '{profile}': expected one of {known}, or the path of a YAML file")
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise ProfileError(f"profile {path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ProfileError(f"profile {path} holds a {type(values).__name__}: expected sections such as `people:`")
        base = values.pop("base", None)
        merged = self._read(base) if base else {}
        for section, fields in values.items():
            if isinstance(fields, dict):
                merged[section] = merged.get(section, {}) | {
                    name: copy.deepcopy(value) for name, value in fields.items()
                }
                self.origins |= {f"{section}.{name}": str(path.name) for name in fields}
            else:
                merged[section] = fields
        return merged

    def _apply(self, values: dict[str, Any], override: str) -> None:
        name, equals, text = override.partition("=")
        path = name.split(".")
        if not equals or len(path) < 2 or not all(path):
            raise ProfileError(f"--set {override}: expected section.field=value, such as people.max_people=3")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ProfileError(f"--set {override}: the value {text!r} is not YAML; quote it") from None
        if len(path) > 2 and path[0] in Profile.model_fields:  # inside a field: start from the field's default
            default = Profile().model_dump(mode="json")[path[0]]
            values.setdefault(path[0], {}).setdefault(path[1], default.get(path[1], {}))
        target = values
        for step in path[:-1]:
            target = _descend(target, step, override)
        if isinstance(target, list):
            target[int(path[-1])] = value
        else:
            target[path[-1]] = value
        self.origins[".".join(path[:2])] = "--set"

    def rows(self) -> list[dict[str, Any]]:
        """Each field with its value and where it came from."""
        table = []
        for section in type(self.profile).model_fields:
            config = getattr(self.profile, section)
            if isinstance(config, BaseModel):
                for name, value in config.model_dump(mode="json").items():
                    origin = self.origins.get(f"{section}.{name}", "default")
                    table.append({"setting": f"{section}.{name}", "value": value, "from": origin})
        return table


def _descend(target: Any, step: str, override: str) -> Any:
    if isinstance(target, list):
        if not step.isdigit() or int(step) >= len(target):
            raise ProfileError(f"--set {override}: '{step}' is not an index into a list of {len(target)}")
        return target[int(step)]
    return target.setdefault(step, {})


def _explain(error: ValidationError, origins: dict[str, str]) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        origin = origins.get(".".join(str(part) for part in problem["loc"][:2]))
        hint = "unknown setting; `moviedreamer profile show` lists all" if problem["type"] == "extra_forbidden" else ""
        value = "" if hint else f", got {problem['input']!r}"
        lines.append(f"{where}: {hint or problem['msg']}{value}{f' (from {origin})' if origin else ''}")
    return "\n".join(lines)


def require_weights(profile: Profile, stages: Iterable[str] | None = None) -> None:
    """Refuse to start what would fail later for want of weights, those of some stages or of all.

    Raises:
        WeightsError: Some are not here; the message names all of them and how to get them.
    """
    missing = [name for name in profile.weights(stages) if missing_files(name, profile.engine.weights_dir)]
    if own := [name for name in missing if name not in TABLE]:
        raise WeightsError(f"there are no weights at {', '.join(own)}: correct the setting, or put them there")
    if missing:
        raise WeightsError(f"weights are missing: run `moviedreamer weights pull {' '.join(missing)}`")


def prepare_prefect(workspace: Path) -> Path | None:
    """Set what Prefect needs before it is imported; a user's own settings win.

    Returns:
        The folder of a temporary server's database, in the workspace; None where a server is configured.
    """
    has_server = bool(os.environ.get("PREFECT_API_URL")) or (Path.home() / ".prefect" / "profiles.toml").is_file()
    settings = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,stages",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }
    if not has_server:
        (workspace / "prefect").mkdir(parents=True, exist_ok=True)
        settings["PREFECT_HOME"] = str(workspace / "prefect")
        settings["PREFECT_LOGGING_LEVEL"] = "WARNING"
        settings["PREFECT_CLIENT_MAX_RETRIES"] = "2"  # a temporary server that is gone does not come back
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return None if has_server else Path(os.environ["PREFECT_HOME"])
