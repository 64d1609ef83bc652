import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.colors import (
    NAMES,
    NamedColor,
    base_name,
    lab_of,
    measure_colors,
    name_color,
    name_colors,
    name_main_colors,
)

PIXELS = hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.just(3)))


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"),
        ((20, 18, 16), "black"),
        ((60, 60, 60), "dark grey"),
        ((128, 128, 128), "grey"),
        ((192, 192, 192), "light grey"),
        ((255, 255, 255), "white"),
        ((255, 0, 0), "red"),
        ((139, 0, 0), "dark red"),
        ((255, 165, 0), "orange"),
        ((139, 69, 19), "brown"),
        ((60, 40, 25), "dark brown"),
        ((210, 180, 140), "beige"),
        ((255, 255, 0), "yellow"),
        ((240, 230, 140), "light yellow"),
        ((128, 128, 0), "olive"),
        ((0, 255, 0), "green"),
        ((0, 100, 0), "dark green"),
        ((144, 238, 144), "light green"),
        ((0, 128, 128), "turquoise"),
        ((0, 0, 255), "blue"),
        ((0, 0, 128), "dark blue"),
        ((135, 206, 235), "light blue"),
        ((112, 128, 144), "grey-blue"),
        ((128, 0, 128), "dark purple"),
        ((255, 105, 180), "pink"),
        ((255, 192, 203), "light pink"),
    ],
)
def test_everyday_colors_have_everyday_names(rgb: tuple[int, int, int], name: str) -> None:
    assert name_color(rgb) == name


@given(st.integers(0, 255))
def test_greys_have_no_hue(level: int) -> None:
    assert base_name(name_color((level, level, level))) in ("black", "grey", "white")


def test_every_color_has_a_name_and_every_name_a_color() -> None:
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    used = set(name_colors(lab_of(cube)).tolist())
    assert used == set(range(len(NAMES)))


@given(PIXELS, st.randoms())
def test_shares_add_up_whatever_the_order_of_pixels(pixels: np.ndarray, random) -> None:
    found = measure_colors(lab_of(pixels))
    order = list(range(len(pixels)))
    random.shuffle(order)
    assert measure_colors(lab_of(pixels[order])) == found
    assert sum(color.share for color in found) == pytest.approx(1)
    assert [color.share for color in found] == sorted((color.share for color in found), reverse=True)


def test_no_pixels_have_no_colors() -> None:
    assert measure_colors(lab_of(np.zeros((0, 3), np.uint8))) == []


@pytest.mark.parametrize(
    ("shares", "names"),
    [
        ({"dark green": 0.5, "light green": 0.4, "red": 0.1}, ["green"]),
        ({"dark green": 0.8, "green": 0.1, "red": 0.1}, ["dark green"]),
        ({"brown": 0.4, "light blue": 0.3, "black": 0.2, "red": 0.1}, ["brown", "light blue", "black"]),
        ({"brown": 0.76, "light blue": 0.24}, ["brown"]),
        ({"brown": 0.24, "blue": 0.24, "red": 0.2, "green": 0.2, "black": 0.12}, []),
        ({"brown": 0.3, "blue": 0.14, "red": 0.14, "green": 0.14, "black": 0.14, "grey": 0.14}, []),
        ({}, []),
    ],
)
def test_main_colors_cover_most_or_are_not_named(shares: dict[str, float], names: list[str]) -> None:
    found = [NamedColor(name, share) for name, share in shares.items()]
    assert name_main_colors(found, colorless=False) == names


def test_a_colorless_picture_has_tones() -> None:
    found = [NamedColor("dark grey-blue", 0.4), NamedColor("black", 0.35), NamedColor("white", 0.25)]
    assert name_main_colors(found, colorless=True) == ["mid-grey", "dark"]
