"""Pictures that are done, kept while others are still being made.

Dimensions: height, width in pixels.
"""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from models.latents import write_jpeg


class PictureFolder:
    """Pictures that are done, as JPEG files: what a killed run left is not painted again."""

    def __init__(self, folder: Path, jpeg_quality: int) -> None:
        self.folder, self._jpeg_quality = folder, jpeg_quality
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, frame: int) -> Path:
        """Where the picture of a frame is, or will be."""
        return self.folder / f"picture-{frame:06d}.jpg"

    def __contains__(self, frame: int) -> bool:
        return self.path(frame).is_file()

    def keep(self, frame: int, picture: Float[Tensor, "3 height width"]) -> None:
        """Write an RGB picture in 0..1 under a temporary name, and rename it when it is complete."""
        temporary = self.path(frame).with_suffix(".part")
        temporary.write_bytes(write_jpeg(picture.float(), self._jpeg_quality))
        temporary.replace(self.path(frame))

    def read(self, frame: int) -> bytes:
        """The JPEG of a frame."""
        return self.path(frame).read_bytes()
