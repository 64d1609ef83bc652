"""Pictures as bytes and as files: decoded in one way, and what somebody brings is looked at before it is decoded.

Dimensions: height, width in pixels.
"""

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

MAX_PIXELS = 8192 * 4320
"""Of a picture that somebody brings."""


class PictureError(ValueError):
    """Pictures cannot be used; the message names the place, what was found and what to do."""


def decode_picture(data: bytes | None) -> UInt8[np.ndarray, "height width 3"] | None:
    """An RGB picture, or None where the bytes are none."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None


def decode_gray(data: bytes | None) -> UInt8[np.ndarray, "height width"] | None:
    """A picture without colour, such as a mask, or None where the bytes are none."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None


def read_picture_file(path: Path) -> bytes:
    """A file's bytes, once they were decoded whole; errors of `load_picture_file`."""
    return load_picture_file(path)[0]


def load_picture_file(path: Path) -> tuple[bytes, Image.Image]:
    """A file's bytes, and the picture that they are.

    Raises:
        PictureError: It is no whole picture, or claims to be huge, which is refused before it is decoded.
    """
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"it is {picture.width} x {picture.height}")
        picture.load()
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path}: more than {MAX_PIXELS:,} pixels ({error}): scale the picture down") from error
    except OSError as error:
        if error.strerror:
            raise PictureError(f"{path}: cannot be read ({error.strerror}): correct the path") from error
        raise PictureError(f"{path}: cannot be read as a picture ({error}): give a JPEG or PNG file") from error
    except Exception as error:  # those of PIL's many decoders
        raise PictureError(f"{path}: cannot be read as a picture ({error}): give a JPEG or PNG file") from error
    return data, picture
