# SPDX-License-Identifier: Apache-2.0
"""Changes of colour, against what Pillow and SciPy make of the same image."""

import ast
import colorsys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from vit_jax.data.ops import colors

GOLDEN = np.load(Path(__file__).parents[2] / "testdata" / "pillow.npz")
IMAGE = GOLDEN["image"]
CALLS = [name for name in GOLDEN.files if name != "image" and "resize" not in name]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_each_function_of_pillow_has_a_golden_array():
    assert {call.partition("(")[0] for call in CALLS} == {
        "grayscale",
        "invert",
        "autocontrast",
        "equalize",
        "solarize",
        "posterize",
        "adjust_brightness",
        "adjust_contrast",
        "adjust_saturation",
        "adjust_sharpness",
    }


@pytest.mark.parametrize("call", CALLS)
def test_colours_are_those_of_pillow(call):
    name, _, arguments = call.partition("(")
    before = IMAGE.copy()
    result = getattr(colors, name)(IMAGE, *ast.literal_eval(f"[{arguments[:-1]}]"))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, GOLDEN[call])
    np.testing.assert_array_equal(IMAGE, before)


def test_posterizing_to_no_bits_is_black():
    assert not colors.posterize(IMAGE, 0).any()


def test_solarize_add_brightens_what_is_dark():
    result = colors.solarize_add(IMAGE, 110)
    dark = IMAGE < 128
    np.testing.assert_array_equal(result[~dark], IMAGE[~dark])
    np.testing.assert_array_equal(result[dark], IMAGE[dark] + 110)
    assert (colors.solarize_add(IMAGE, 250)[(IMAGE > 5) & dark] == 255).all()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_gaussian(sigma):
    image = noise(20, 30, 3)
    exact = ndimage.gaussian_filter(image.astype(float), sigma, axes=(0, 1), mode="nearest")
    assert np.abs(colors.blur(image, sigma) - exact).max() < 0.501


@pytest.mark.parametrize("value", [0, 77, 255])
def test_one_colour_has_no_contrast_to_stretch(value):
    image = np.full((3, 4, 3), value, np.uint8)
    np.testing.assert_array_equal(colors.autocontrast(image), image)
    np.testing.assert_array_equal(colors.equalize(image), image)


@pytest.mark.parametrize("share", [0.0, 1 / 3, -0.25])
def test_hue_is_turned_around_the_circle(share):
    """Against `colorsys`, up to the rounding of hue, saturation and value to uint8."""
    steps = int(share * 255) / 256
    image = noise(6, 7, 3)
    got = colors.turn_hue(image, share)
    want = np.empty(image.shape)
    for index in np.ndindex(6, 7):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[index] / 255.0))
        want[index] = colorsys.hsv_to_rgb((hue + steps) % 1, saturation, value)
    assert np.abs(got - 255 * want).max() < 8
    assert np.abs(got - 255 * want).mean() < 2
