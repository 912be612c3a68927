# SPDX-License-Identifier: Apache-2.0
"""Resizing against Pillow and closed forms, and affine maps against SciPy."""

import ast
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from vit_jax.data.ops import geometry
from vit_jax.data.ops.geometry import resize_image

GOLDEN = np.load(Path(__file__).parents[2] / "testdata" / "pillow.npz")
FILL = (10, 128, 250)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("call", [name for name in GOLDEN.files if "resize" in name])
def test_resizing_of_pillow_is_the_same_to_the_last_bit(call):
    arguments = ast.literal_eval(call.removeprefix("resize_image"))
    result = resize_image(GOLDEN["image"], *arguments)
    assert result.dtype == np.uint8
    assert result.flags.writeable  # Later operations may work in place.
    np.testing.assert_array_equal(result, GOLDEN[call])


def test_area_averages_where_it_shrinks():
    image = noise(12, 20, 3)
    mean = image.reshape(4, 3, 5, 4, 3).mean((1, 3))
    assert np.abs(resize_image(image, 4, 5, "area") - mean).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("size", [(24, 40), (24, 10), (6, 40)])
def test_area_is_bilinear_where_it_enlarges(size):
    image = noise(12, 20, 3)
    np.testing.assert_array_equal(resize_image(image, *size, "area"), resize_image(image, *size))


def cubic(x):
    """The kernel of Keys (1981) with a = -0.75."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def cubic_matrix(old, new):
    """The matrix that resizes one axis, the edge going on beyond the border."""
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += cubic(centre - tap)
    return matrix


@pytest.mark.parametrize("size", [(7, 5), (30, 44), (12, 50)])
def test_bicubic_has_the_kernel_of_keys_and_no_antialiasing(size):
    image = noise(12, 20, 3).astype(np.float32)
    rows, columns = cubic_matrix(12, size[0]), cubic_matrix(20, size[1])
    exact = np.einsum("yh,hwc,xw->yxc", rows, image, columns)
    np.testing.assert_allclose(resize_image(image, *size, "bicubic"), exact, atol=1e-2)


def expected_warp(image, matrix, order):
    """SciPy's map, and where it is certain: places are not next to where rounding changes."""
    matrix = np.array(matrix, float)
    rows_first = np.array([[matrix[1, 1], matrix[1, 0]], [matrix[0, 1], matrix[0, 0]]])
    offset = matrix[::-1, 2]
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    places = np.einsum("ij,jyx->iyx", rows_first, np.stack([y, x])) + offset[:, None, None]
    certain = (np.abs(places % 1 - 0.5) > 0.02).all(0) if order == 0 else np.full(y.shape, True)
    channels = [
        ndimage.affine_transform(
            image[..., c].astype(float),
            rows_first,
            offset,
            order=order,
            mode="grid-constant",
            cval=FILL[c],
        )
        for c in range(3)
    ]
    return np.stack(channels, -1), certain


def about_centre(degrees, height, width):
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    to_centre = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return (to_centre @ turn @ np.linalg.inv(to_centre))[:2]


WARPS = {
    "rotate(30)": (lambda *a, **k: geometry.rotate(*a, 30, **k), about_centre(30, 33, 41)),
    "rotate(-45)": (lambda *a, **k: geometry.rotate(*a, -45, **k), about_centre(-45, 33, 41)),
    "shear_x": (lambda *a, **k: geometry.shear_x(*a, 0.29, **k), [[1, 0.29, 0], [0, 1, 0]]),
    "shear_y": (lambda *a, **k: geometry.shear_y(*a, -0.17, **k), [[1, 0, 0], [-0.17, 1, 0]]),
    "translate": (
        lambda *a, **k: geometry.translate(*a, 7.3, -2.8, **k),
        [[1, 0, 7.3], [0, 1, -2.8]],
    ),
}


@pytest.mark.parametrize("order", [0, 1], ids=["nearest", "bilinear"])
@pytest.mark.parametrize("name", WARPS)
def test_affine_maps_are_those_of_scipy(name, order):
    function, matrix = WARPS[name]
    # Smooth, because OpenCV finds the place between two pixels to a 32nd only.
    y, x = np.mgrid[:33, :41]
    image = np.stack([40 + 4 * x, 200 - 3 * y, 20 + 2 * x + 3 * y], -1).astype(np.uint8)
    flag = (cv2.INTER_NEAREST, cv2.INTER_LINEAR)[order]
    result = function(image, fill=FILL, flag=flag)
    exact, certain = expected_warp(image, matrix, order)
    inside = np.abs(exact - FILL).min(-1) > 0
    assert certain.mean() > 0.8
    tolerance = 0 if order == 0 else 1
    # Half-way between an edge and the fill the colours differ by more than a ramp's step.
    border = ndimage.binary_dilation(~inside, iterations=2) if order else np.zeros_like(inside)
    different = np.abs(result - exact).max(-1) > tolerance
    assert not (different & certain & ~border).any()


def test_turning_by_a_right_angle_moves_pixels_alone():
    image = noise(9, 9, 3)
    result = geometry.rotate(image, 90, fill=FILL, flag=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(result, np.rot90(image))


def test_translation_fills_what_comes_from_outside():
    image = noise(6, 8, 3)
    result = geometry.translate(image, 3, 0, fill=FILL, flag=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(result[:, :5], image[:, 3:])
    assert (result[:, 5:] == FILL).all()


def test_cut_out_fills_a_square_and_is_cut_off_at_the_border():
    image = noise(10, 10, 3)
    result = geometry.cut_out(image, 2, 5, 3, fill=FILL)
    assert (result[:5, 2:8] == FILL).all()
    changed = (result != image).any(-1)
    assert not changed[5:].any()
    assert not changed[:, :2].any()
    assert not changed[:, 8:].any()
    np.testing.assert_array_equal(geometry.cut_out(image, 2, 5, 0, fill=FILL), image)
