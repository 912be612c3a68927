# SPDX-License-Identifier: Apache-2.0
"""Positions that are computed: closed forms on rectangular grids."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.positions import (
    CoordinateNoise,
    patch_grid,
    resize_patches,
    rotate,
    rotation_2d,
    sincos_2d,
)
from vit_jax.utils.errors import UserError

GOLDEN = Path(__file__).parents[1] / "testdata" / "vit5_rope.npz"


def test_sincos_has_a_quarter_of_the_channels_for_each_function_and_axis():
    embedding = sincos_2d((2, 3), 12)
    assert embedding.shape == (1, 6, 12)
    row, column = 1, 2
    frequencies = np.array([1.0, 1e-2, 1e-4])
    want = [np.sin(column * frequencies), np.cos(column * frequencies)]
    want += [np.sin(row * frequencies), np.cos(row * frequencies)]
    np.testing.assert_allclose(embedding[0, row * 3 + column], np.concatenate(want), atol=1e-7)


def test_rotation_turns_pairs_by_row_then_by_column():
    rotation = rotation_2d((2, 3), 8, theta=100.0, num_prefix_tokens=1)
    x = np.random.default_rng(0).normal(size=(1, 7, 2, 8)).astype(np.float32)
    turned = np.asarray(rotate(jax.numpy.asarray(x), rotation))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])  # the prefix has no position
    row, column = 1, 2
    angles = np.array([row, row * 0.1, column, column * 0.1])
    pairs = x[0, 1 + row * 3 + column].reshape(2, 4, 2)
    as_complex = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    want = np.stack([as_complex.real, as_complex.imag], axis=-1).reshape(2, 8)
    np.testing.assert_allclose(turned[0, 1 + row * 3 + column], want, atol=1e-6)


def test_positions_of_another_grid_span_those_of_the_reference():
    options = {"theta": 100.0, "num_prefix_tokens": 1}
    reference = rotation_2d((4, 6), 8, **options)
    same = rotation_2d((4, 6), 8, reference_grid=(4, 6), **options)
    np.testing.assert_array_equal(same.cos, reference.cos)
    # Twice as many rows and three times as many columns: each second and third stays where it was.
    finer = rotation_2d((8, 18), 8, reference_grid=(4, 6), **options)
    np.testing.assert_array_equal(finer.sin[0], 0)
    grid = np.asarray(finer.sin)[1:].reshape(8, 18, 8)
    np.testing.assert_allclose(grid[::2, ::3].reshape(24, 8), reference.sin[1:], atol=1e-6)


def test_products_of_rotated_vectors_depend_on_the_offset_only():
    rotation = rotation_2d((4, 4), 8, theta=100.0, num_prefix_tokens=0)
    rng = np.random.default_rng(0)
    query, key = (np.broadcast_to(rng.normal(size=8), (1, 16, 1, 8)) for _ in range(2))
    queries = np.asarray(rotate(jax.numpy.asarray(query), rotation))[0, :, 0]
    keys = np.asarray(rotate(jax.numpy.asarray(key), rotation))[0, :, 0]
    products = (queries @ keys.T).reshape(4, 4, 4, 4)
    np.testing.assert_allclose(products[0, 0, 1, 2], products[2, 1, 3, 3], atol=1e-5)
    assert abs(products[0, 0, 1, 2] - products[0, 0, 2, 1]) > 1e-3


def test_centred_positions_are_angles_of_the_centres_of_patches():
    """arXiv:2508.10104: coordinates in (-1, 1) by axis, times 2 pi over periods of base 100."""
    rotation = rotation_2d((2, 3), 8, theta=100.0, num_prefix_tokens=1, coordinates="centered")
    row, column = 1, 2
    y, x = 2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1
    angles = 2 * np.pi * np.array([y, y / 10, x, x / 10])
    np.testing.assert_array_equal(rotation.cos[0], 1)
    got = rotation.cos[1 + row * 3 + column], rotation.sin[1 + row * 3 + column]
    np.testing.assert_allclose(got[0], np.repeat(np.cos(angles), 2), atol=1e-6)
    np.testing.assert_allclose(got[1], np.repeat(np.sin(angles), 2), atol=1e-6)


@pytest.mark.parametrize("grid", [(2, 3), (6, 10)])
def test_coordinates_of_training_are_shifted_then_stretched_by_axis_then_together(grid):
    def coordinates(seed, **noise):
        rotation = rotation_2d(
            grid,
            8,
            theta=1e8,  # The second frequency is 1e-4, whose angles never wrap.
            num_prefix_tokens=0,
            coordinates="centered",
            noise=CoordinateNoise(**noise),
            rng=None if seed is None else jax.random.key(seed),
        )
        angles = np.arctan2(np.asarray(rotation.sin, np.float64), rotation.cos)[:, [2, 6]]
        return angles / 1e-4 / (2 * np.pi)

    plain = coordinates(None)
    shifts = np.array([(coordinates(i, shift=0.5) - plain) for i in range(40)])
    np.testing.assert_allclose(shifts, np.broadcast_to(shifts[:, :1], shifts.shape), atol=1e-5)
    assert 0.3 < np.abs(shifts).max() <= 0.5 + 1e-5
    assert np.abs(shifts[:, 0, 0] - shifts[:, 0, 1]).max() > 0.3  # each axis by itself
    ratio = np.array([coordinates(i, jitter=2.0)[0] / plain[0] for i in range(40)])
    assert 0.5 - 1e-5 <= ratio.min() < 0.6 < 1.7 < ratio.max() <= 2 + 1e-5
    assert np.abs(ratio[:, 0] - ratio[:, 1]).max() > 0.5
    both = np.array([coordinates(i, rescale=2.0)[0] / plain[0] for i in range(40)])
    np.testing.assert_allclose(both[:, 0], both[:, 1], rtol=1e-4)
    assert 0.5 - 1e-5 <= both.min() < 0.6 < 1.7 < both.max() <= 2 + 1e-5
    all_three = coordinates(3, shift=0.5, jitter=2.0, rescale=2.0)
    own = coordinates(3, shift=0.5) * coordinates(3, jitter=2.0)[0] / plain[0]
    own *= coordinates(3, rescale=2.0)[0] / plain[0]
    np.testing.assert_allclose(all_three, own, atol=1e-4)


@pytest.mark.parametrize(("prefix", "side", "theta"), [("", 4, 1e4), ("register_", 2, 100.0)])
def test_rotations_are_those_of_vit5(prefix, side, theta):
    """Origin: outputs of the code of wangf3014/ViT-5 (Apache 2.0) for random inputs."""
    with np.load(GOLDEN) as file:
        x, want = file[f"{prefix}rope_in"], file[f"{prefix}rope_out"]
    rotation = rotation_2d((side, side), x.shape[-1], theta=theta, num_prefix_tokens=0)
    np.testing.assert_allclose(rotate(jnp.asarray(x), rotation), want, atol=1e-6)


def test_grid_of_a_rectangle():
    assert patch_grid((32, 48), (16, 8)) == (2, 6)
    with pytest.raises(UserError, match="image of 32x50 can't be cut into patches of 16x8"):
        patch_grid((32, 50), (16, 8))


def test_without_the_endpoint_frequencies_are_those_of_mae():
    """arXiv:2111.06377 takes 10000^(-i / n) for n frequencies, and columns before rows."""
    row, column, width = 1, 2, 16
    powers = 10_000.0 ** -(np.arange(4) / 4)
    want = [f(x * powers) for x in (column, row) for f in (np.sin, np.cos)]
    got = sincos_2d((2, 3), width, endpoint=False)[0, 3 * row + column]
    np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-6)


def test_patches_are_resized_by_keys_kernel():
    """Half of the size: at offset 1/2, Keys' kernel with a = -0.75 has these four weights."""
    x = np.random.default_rng(0).normal(size=(2, 64, 3))
    got = resize_patches(jnp.asarray(x), (8, 8), (4, 4))
    taps = np.array([-0.09375, 0.59375, 0.59375, -0.09375])
    padded = np.pad(x.reshape(2, 8, 8, 3), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    want = np.zeros((2, 4, 4, 3))
    for i, a in enumerate(taps):
        for j, b in enumerate(taps):
            want += a * b * padded[:, i : i + 7 : 2, j : j + 7 : 2]
    np.testing.assert_allclose(got, want.reshape(2, 16, 3), atol=1e-5)
