"""Everyday names of colours, and how much of a picture has which.

Colours are named in CIELAB (D65), where distances are about as large as they look: neutral tones by lightness,
muted ones by lightness and a coarse hue, the rest by hue with "dark" and "light". Every pixel is named and names
are counted, so no mean of two colours is ever named and there is nothing random.

Dimensions: height, width: pixels; pixel: a list of pixels; 3: red, green, blue.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

NEUTRAL_CHROMA = 6.0
"""Below this CIELAB chroma a colour looks grey."""
MUTED_CHROMA = 16.0
"""Below this it looks greyish: only a coarse hue is named."""

NAMES = (
    "black", "dark grey", "grey", "light grey", "white",
    "dark brown", "grey-brown", "beige",
    "dark grey-green", "grey-green", "light grey-green",
    "dark grey-blue", "grey-blue", "light grey-blue",
    "dark grey-purple", "grey-purple", "light grey-purple",
    "dark red", "red", "light red",
    "brown", "orange", "light orange",
    "olive", "yellow", "light yellow",
    "dark green", "green", "light green",
    "dark turquoise", "turquoise", "light turquoise",
    "dark blue", "blue", "light blue",
    "dark purple", "purple", "light purple",
    "dark pink", "pink", "light pink",
)  # fmt: skip
"""Every name that `name_colors` can give."""

_INDEX = {name: index for index, name in enumerate(NAMES)}
_BLACK_LIGHTNESS = 14.0
# Upper bounds of lightness for dark grey, grey and light grey; above is white.
_GREY_BOUNDS = (36.0, 62.0, 86.0)
# Hue angles in degrees where a family ends; its dark, middle and light names; the lightness between them.
_MUTED_BOUNDS = (36.0, 64.0)
_MUTED = (
    (20.0, ("dark grey-purple", "grey-purple", "light grey-purple"), _MUTED_BOUNDS),
    (110.0, ("dark brown", "grey-brown", "beige"), _MUTED_BOUNDS),
    (190.0, ("dark grey-green", "grey-green", "light grey-green"), _MUTED_BOUNDS),
    (300.0, ("dark grey-blue", "grey-blue", "light grey-blue"), _MUTED_BOUNDS),
    (360.0, ("dark grey-purple", "grey-purple", "light grey-purple"), _MUTED_BOUNDS),
)
_COOL = (
    (165.0, ("dark green", "green", "light green"), (38.0, 72.0)),
    (218.0, ("dark turquoise", "turquoise", "light turquoise"), (38.0, 76.0)),
    (308.0, ("dark blue", "blue", "light blue"), (36.0, 64.0)),
    (335.0, ("dark purple", "purple", "light purple"), (34.0, 64.0)),
    (360.0, ("dark pink", "pink", "light pink"), (45.0, 78.0)),
)
_SOFT = (
    (14.0, ("dark pink", "pink", "light pink"), (45.0, 78.0)),
    (46.0, ("dark brown", "brown", "pink"), (26.0, 58.0)),
    (80.0, ("dark brown", "brown", "beige"), (26.0, 68.0)),
    (108.0, ("dark brown", "brown", "beige"), (26.0, 62.0)),
    *_COOL,
)
_CLEAR = (
    (20.0, ("dark pink", "pink", "light pink"), (45.0, 78.0)),
    (46.0, ("dark red", "red", "light red"), (34.0, 64.0)),
    (62.0, ("dark brown", "brown", "light orange"), (26.0, 78.0)),
    (80.0, ("dark brown", "brown", "beige"), (26.0, 68.0)),
    (108.0, ("olive", "yellow", "light yellow"), (62.0, 90.0)),
    *_COOL,
)
_SOFT_CHROMA = 32.0
# Orange is what stays of the brown hues when they are strong and light enough.
_ORANGE_HUES = (46.0, 80.0)
_ORANGE_CHROMA = 54.0
_ORANGE_LIGHTNESS = 52.0
# A strong colour is called light or dark only up to these chromas: pure blue is blue, though its lightness is 32.
_LIGHT_CHROMA = 62.0
_DARK_CHROMA = 90.0
_MIDDLE_LIGHTNESS = (50.0, 63.0)
# Colours are told only if the first covers so much, and those named cover so much together.
_FIRST_SHARE = 0.25
_TOGETHER_SHARE = 0.5
# A further colour is named from this share on; no more when those named cover so much.
_NEXT_SHARE = 0.15
_ENOUGH_SHARE = 0.75
# "dark" or "light" is said of a colour when so much of it is.
_SHADE_SHARE = 0.65
_TONES = {"black": "dark", "dark grey": "dark", "grey": "mid-grey", "light grey": "light", "white": "light"}


@dataclass(frozen=True, slots=True)
class NamedColor:
    """A name and the share of the pixels, 0..1, that it fits."""

    name: str
    share: float


def lab_of(rgb: UInt8[np.ndarray, "pixel 3"]) -> Float[np.ndarray, "pixel 3"]:
    """CIELAB of sRGB pixels: lightness 0..100, a and b about -110..110, float32."""
    if len(rgb) == 0:
        return np.zeros((0, 3), np.float32)
    scaled = np.ascontiguousarray(rgb, dtype=np.float32)[None] / np.float32(255)
    return cv2.cvtColor(scaled, cv2.COLOR_RGB2LAB)[0]


def chroma_of(lab: Float[np.ndarray, "pixel 3"]) -> Float[np.ndarray, " pixel"]:
    """Distance from grey, 0..about 130."""
    return np.hypot(lab[:, 1], lab[:, 2])


def name_colors(lab: Float[np.ndarray, "pixel 3"]) -> Int[np.ndarray, " pixel"]:
    """Name each pixel: indices into `NAMES`."""
    lightness, chroma = lab[:, 0], chroma_of(lab)
    hue = np.degrees(np.arctan2(lab[:, 2], lab[:, 1])) % 360
    names = np.full(len(lab), _INDEX["black"])
    neutral = chroma < NEUTRAL_CHROMA
    names[neutral] = 1 + np.searchsorted(_GREY_BOUNDS, lightness[neutral], side="right")
    muted = ~neutral & (chroma < MUTED_CHROMA)
    _name_families(names, muted, hue, lightness, _MUTED)
    soft = (chroma >= MUTED_CHROMA) & (chroma < _SOFT_CHROMA)
    _name_families(names, soft, hue, lightness, _SOFT)
    clear = chroma >= _SOFT_CHROMA
    held = np.where(chroma >= _DARK_CHROMA, np.maximum(lightness, _MIDDLE_LIGHTNESS[0]), lightness)
    held = np.where(chroma >= _LIGHT_CHROMA, np.minimum(held, _MIDDLE_LIGHTNESS[1]), held)
    _name_families(names, clear, hue, held, _CLEAR)
    in_orange_hues = (hue >= _ORANGE_HUES[0]) & (hue < _ORANGE_HUES[1])
    strong = (chroma >= _ORANGE_CHROMA) & (lightness >= _ORANGE_LIGHTNESS)
    names[clear & in_orange_hues & strong] = _INDEX["orange"]
    # In the dark, chroma is mostly noise and compression; only a strong one shows.
    names[(lightness < _BLACK_LIGHTNESS) & (chroma < MUTED_CHROMA)] = _INDEX["black"]
    names[lightness < _BLACK_LIGHTNESS / 2] = _INDEX["black"]
    return names


def _name_families(
    names: Int[np.ndarray, " pixel"],
    where: Bool[np.ndarray, " pixel"],
    hue: Float[np.ndarray, " pixel"],
    lightness: Float[np.ndarray, " pixel"],
    families: tuple[tuple[float, tuple[str, str, str], tuple[float, float]], ...],
) -> None:
    """Write into `names`, where `where` holds, the name of the hue's family at the pixel's lightness."""
    start = 0.0
    for end, family, bounds in families:
        chosen = where & (hue >= start) & (hue < end)
        indices = np.array([_INDEX[name] for name in family])
        names[chosen] = indices[np.searchsorted(bounds, lightness[chosen], side="right")]
        start = end


def name_color(rgb: tuple[int, int, int]) -> str:
    """The name of one sRGB colour, 0..255 a channel."""
    return NAMES[int(name_colors(lab_of(np.array([rgb], np.uint8)))[0])]


def measure_colors(lab: Float[np.ndarray, "pixel 3"]) -> list[NamedColor]:
    """The colours of the pixels, largest share first, ties in the order of `NAMES`; empty without pixels."""
    if len(lab) == 0:
        return []
    counts = np.bincount(name_colors(lab), minlength=len(NAMES))
    order = np.argsort(-counts, kind="stable")
    return [NamedColor(NAMES[i], float(counts[i] / len(lab))) for i in order if counts[i]]


def base_name(name: str) -> str:
    """The name without "dark" and "light"."""
    return name.removeprefix("dark ").removeprefix("light ")


def sum_shares(found: list[NamedColor], colorless: bool) -> dict[str, float]:
    """Shares of the colours without "dark" and "light"; of tones for a colourless picture."""
    shares: dict[str, float] = {}
    for color in found:
        name = _TONES.get(color.name, "mid-grey") if colorless else base_name(color.name)
        shares[name] = shares.get(name, 0.0) + color.share
    return shares


def name_main_colors(found: list[NamedColor], colorless: bool) -> list[str]:
    """One to three colours that together cover most, largest first; none where no few colours do.

    Args:
        found: From `measure_colors`.
        colorless: Name tones (dark, mid-grey, light) instead of colours.
    """
    ranked = sorted(sum_shares(found, colorless).items(), key=lambda item: -item[1])
    if not ranked or ranked[0][1] < _FIRST_SHARE:
        return []
    chosen, covered = [], 0.0
    for base, share in ranked[:3]:
        if chosen and (share < _NEXT_SHARE or covered >= _ENOUGH_SHARE):
            break
        chosen.append(base if colorless else _shade(base, share, found))
        covered += share
    return chosen if covered >= _TOGETHER_SHARE else []


def _shade(base: str, share: float, found: list[NamedColor]) -> str:
    """The colour with "dark" or "light" where most of it is."""
    return next(
        (color.name for color in found if base_name(color.name) == base and color.share >= _SHADE_SHARE * share), base
    )
