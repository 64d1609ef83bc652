"""Which models look at faces: the settings that the faces stage and those after it share."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from models.face_models import FaceModels


class FaceChoice(BaseModel):
    """The models that look at faces, the same in every stage of a profile."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    detector: Literal["centerface", "insightface"] = Field(
        "centerface", description="face detector with five landmarks"
    )
    conditioning: Literal["dinov2", "farl"] = Field("dinov2", description="embedder whose vector conditions the models")
    identity: Literal["dlib", "arcface"] = Field("dlib", description="embedder whose distances tell persons apart")
    insightface_weights: str = Field("buffalo_l", description="InsightFace: name of `weights list` or local folder")
    farl_weights: str = Field("farl", description="FaRL: name of `weights list`, local file or folder")

    def is_heavy(self) -> bool:
        """Whether one of them wants an accelerator."""
        return (self.detector, self.conditioning, self.identity) != ("centerface", "dinov2", "dlib")

    def uses_insightface(self) -> bool:
        """Whether one of them is InsightFace's."""
        return self.detector == "insightface" or self.identity == "arcface"

    def weights(self) -> tuple[str, ...]:
        """Names of those that are used."""
        used = {
            "centerface": self.detector == "centerface",
            "dinov2_small": self.conditioning == "dinov2",
            "dlib_face": self.identity == "dlib",
            self.insightface_weights: self.uses_insightface(),
            self.farl_weights: self.conditioning == "farl",
        }
        return tuple(name for name, wanted in used.items() if wanted)

    def recipe(self) -> dict[str, Any]:
        """What changes results; weights enter by what they hold, not by where they lie."""
        return self.model_dump(mode="json", exclude={"insightface_weights", "farl_weights"})

    def open(self, weights_dir: Path | None) -> "FaceModels":
        """Load them."""
        from models.face_models import FaceModels

        return FaceModels(
            self.detector, self.conditioning, self.identity, self.insightface_weights, self.farl_weights, weights_dir
        )
