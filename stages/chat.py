"""Settings of the stages that may ask a chat model, and the model that they describe."""

import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from stages.errors import UsageError
from stages.spec import StageConfig, neutral

if TYPE_CHECKING:
    from models.chat import ChatModel

PROMPTS_DIR = Path(__file__).parent / "prompts"


class ChatConfig(StageConfig):
    """Settings of a stage that may ask a chat model.

    As long as it asks none, they stay out of the fingerprint.
    """

    model: str | None = Field(
        None, description="chat model: its name at the endpoint; without one a name of `weights list` or local folder"
    )
    prompts: str = Field("1", description="version of the prompts, or a folder with files of the same names")
    max_tokens: int = Field(2048, ge=16, description="longest answer of the chat model")
    endpoint_url: str | None = neutral(
        None, "OpenAI-compatible endpoint, such as http://host:8000/v1; none: the model is a local folder"
    )
    api_key_variable: str = neutral(
        "OPENAI_API_KEY", "environment variable of the workers that holds the endpoint's key"
    )
    concurrency: int = neutral(16, "requests at once, a worker: to the endpoint, or in a batch of a local model", ge=1)
    request_timeout_s: float = neutral(120.0, "longest wait for one answer", gt=0)
    attempts: int = neutral(6, "how often a request is sent before it is given up", ge=1)
    daily_tokens: int | None = neutral(None, "most tokens a day (UTC), over the workers of a host; none for any", ge=1)
    answers: Path | None = neutral(None, "file of kept answers; none is ~/.cache/moviedreamer/answers.sqlite")

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.asks_model() and self.model is None:
            raise ValueError(
                "a chat model is asked, but `model` names none: set it, and endpoint_url unless it is a folder"
            )
        return self

    def asks_model(self) -> bool:
        """Whether these settings need a chat model."""
        raise NotImplementedError

    def prompt_names(self) -> tuple[str, ...]:
        """Names of the prompts that the stage reads."""
        raise NotImplementedError

    def is_heavy(self) -> bool:
        """A chat model that runs here is."""
        return self.asks_model() and self.endpoint_url is None

    def weights(self) -> tuple[str, ...]:
        """The model, where it runs here."""
        return (str(self.model),) if self.asks_model() and self.endpoint_url is None else ()

    def recipe(self) -> dict[str, Any]:
        """The settings that change results; of a chat model also what is asked, word by word.

        A model that runs here enters by what it holds, not by where it lies.
        """
        values = super().recipe()
        if self.endpoint_url is None:
            del values["model"]
        if not self.asks_model():
            own = ChatConfig.model_fields.keys() - StageConfig.model_fields.keys()
            return {name: value for name, value in values.items() if name not in own}
        words = load_prompts(self.prompts, self.prompt_names())
        digest = hashlib.sha256("\0".join(words[name] for name in sorted(words)).encode()).hexdigest()
        return values | {"prompts": f"{Path(self.prompts).name} {digest[:12]}"}


def load_prompts(version: str, names: tuple[str, ...]) -> dict[str, str]:
    """The prompts of a version by name.

    Raises:
        UsageError: There is no such version, or one of its files is missing.
    """
    folder = PROMPTS_DIR / version if (PROMPTS_DIR / version).is_dir() else Path(version).expanduser()
    try:
        paths = {name: folder / f"{name}.txt" for name in names}
        return {name: _read_prompt(path, path.stat().st_mtime_ns) for name, path in paths.items()}
    except OSError as error:
        known = ", ".join(sorted(path.name for path in PROMPTS_DIR.iterdir() if path.is_dir()))
        raise UsageError(
            f"no prompts {version!r} ({error}): expected {known}, or a folder with {names[0]}.txt"
        ) from None


@functools.lru_cache(maxsize=64)
def _read_prompt(path: Path, modified_ns: int) -> str:
    """A prompt; read once, though the recipe of every film asks for it."""
    return path.read_text(encoding="utf-8").strip()


def open_chat_model(config: ChatConfig, weights_dir: Path | None = None) -> "ChatModel":
    """The chat model that a stage's settings describe."""
    from models.answers import AnswerBook, RememberingModel

    name, answers = str(config.model), AnswerBook(config.answers)
    if config.endpoint_url is None:
        from models.vision_language import LocalChatModel
        from models.weights import identity, locate

        model = LocalChatModel(locate(name, weights_dir))
        return RememberingModel(model, identity(name, weights_dir), answers, config.concurrency)
    from models.chat_endpoint import Endpoint, EndpointModel

    endpoint = Endpoint(
        config.endpoint_url, name, config.concurrency, config.request_timeout_s, config.attempts, config.daily_tokens
    )
    variable = config.api_key_variable
    return EndpointModel(endpoint, os.environ.get(variable), answers, f"the variable {variable}")
