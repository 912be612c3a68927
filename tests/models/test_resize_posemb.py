# SPDX-License-Identifier: Apache-2.0
"""Position embeddings are resized as for the published numbers: bilinear, corners aligned."""

from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax.models.positions import resize_biases, resize_posemb

GOLDEN = Path(__file__).parents[1] / "testdata" / "golden"
PATCH = 8

SIZES = [(source, range(2, 41)) for source in range(2, 41)] + [(1, range(1, 5)), (5, [1])]


def random_posemb(length, *, width=5, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(1, length, width)).astype(dtype)


def align_corners(grid, target):
    """The closed form, in float64, one axis after the other."""
    for axis, size in enumerate(target):
        last = grid.shape[axis] - 1
        at = np.linspace(0, last, size)
        grid = np.apply_along_axis(
            lambda values, at=at: np.interp(at, np.arange(len(values)), values), axis, grid
        )
    return grid


@pytest.mark.parametrize(
    ("case", "prefix", "image_size"),
    [("vit_token", 1, 48), ("vit_token", 1, 64), ("vit_gap", 0, 48)],
)
def test_original_code_gives_the_same(case, prefix, image_size):
    with np.load(GOLDEN / f"{case}.npz") as file, np.load(GOLDEN / f"{case}_io.npz") as io:
        posemb = file["Transformer/posembed_input/pos_embedding"]
        expected = io[f"posemb_{image_size}"]
    size = image_size // PATCH
    resized = resize_posemb(
        posemb, source_grid=(4, 4), target_grid=(size, size), num_prefix_tokens=prefix
    )
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("source", "targets"), SIZES)
def test_equals_the_closed_form(source, targets):
    for target in targets:
        # The columns go another way than the rows, so that the two axes can't be confused.
        source_grid, target_grid = (source, target), (target, source)
        posemb = random_posemb(1 + source * target)
        resized = resize_posemb(
            posemb, source_grid=source_grid, target_grid=target_grid, num_prefix_tokens=1
        )
        assert resized.shape == posemb.shape
        grid = posemb[0, 1:].reshape(*source_grid, -1).astype(np.float64)
        expected = align_corners(grid, target_grid)
        np.testing.assert_allclose(
            resized[0, 1:].reshape(expected.shape), expected, rtol=0, atol=1e-6, err_msg=str(target)
        )


@pytest.mark.parametrize(("source", "target"), [(28, 48), (16, 30), (15, 26), (32, 16)])
def test_last_row_and_column_are_those_of_the_source(source, target):
    posemb = random_posemb(source**2)
    resized = resize_posemb(
        posemb, source_grid=(source, source), target_grid=(target, target), num_prefix_tokens=0
    )
    grid, resized = posemb.reshape(source, source, 5), resized.reshape(target, target, 5)
    np.testing.assert_array_equal(
        resized[[0, 0, -1, -1], [0, -1, 0, -1]], grid[[0, 0, -1, -1], [0, -1, 0, -1]]
    )
    assert np.all(np.any(resized[-1] != 0, axis=-1))
    assert np.all(np.any(resized[:, -1] != 0, axis=-1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
def test_prefix_and_type_are_kept(num_prefix_tokens, dtype):
    posemb = random_posemb(num_prefix_tokens + 9, dtype=dtype)
    resized = resize_posemb(
        posemb, source_grid=(3, 3), target_grid=(2, 7), num_prefix_tokens=num_prefix_tokens
    )
    assert resized.dtype == dtype
    assert resized.shape == (1, num_prefix_tokens + 14, 5)
    np.testing.assert_array_equal(resized[:, :num_prefix_tokens], posemb[:, :num_prefix_tokens])


def test_same_grid_is_the_identity():
    posemb = random_posemb(1 + 12)
    resized = resize_posemb(posemb, source_grid=(3, 4), target_grid=(3, 4), num_prefix_tokens=1)
    np.testing.assert_array_equal(resized, posemb)


@pytest.mark.parametrize(("source", "target"), [(4, 9), (9, 4), (7, 12), (14, 5), (3, 3)])
def test_bicubic_is_the_antialiased_one_of_images(source, target):
    posemb = random_posemb(1 + source * source)
    got = resize_posemb(
        posemb,
        source_grid=(source, source),
        target_grid=(target, target),
        num_prefix_tokens=1,
        method="bicubic",
    )
    grid = posemb[:, 1:].reshape(source, source, -1)
    want = jax.image.resize(grid, (target, target, grid.shape[-1]), "cubic", antialias=True)
    np.testing.assert_array_equal(got[:, 0], posemb[:, 0])
    np.testing.assert_allclose(got[0, 1:], want.reshape(target * target, -1), atol=1e-5)


POSITIONS = np.load(Path(__file__).parents[1] / "testdata" / "torch" / "positions.npz")


@pytest.mark.parametrize("case", [name for name in POSITIONS.files if name != "posemb"])
def test_timm_gives_the_same_without_aligned_corners(case):
    method, rows, columns = case.rsplit("_", 2)
    got = resize_posemb(
        POSITIONS["posemb"],
        source_grid=(4, 6),
        target_grid=(int(rows), int(columns)),
        num_prefix_tokens=1,
        method=method,
    )
    np.testing.assert_allclose(got, POSITIONS[case], rtol=0, atol=2e-6)


BIASES = np.load(Path(__file__).parents[1] / "testdata" / "torch" / "biases.npz")


@pytest.mark.parametrize("target", [(6, 5), (3, 3), (4, 7), (2, 9), (24, 24), (1, 1)])
def test_biases_by_distance_are_resized_as_by_timm(target):
    resized = resize_biases(BIASES["table"], source_grid=(4, 4), target_grid=target)
    assert resized.dtype == np.float32
    expected = BIASES["_".join(map(str, target))]
    np.testing.assert_allclose(resized, expected, rtol=0, atol=2e-6)


def test_biases_of_neighbours_and_of_prefix_tokens_stay():
    table = np.random.default_rng(0).normal(size=(3 * 5 + 3, 2)).astype(np.float32)
    resized = resize_biases(table, source_grid=(2, 3), target_grid=(4, 6))
    np.testing.assert_array_equal(resized[-3:], table[-3:])
    # Those of distances up to one patch, in both directions.
    before = table[:-3].reshape(3, 5, 2)[:, 1:4]
    after = resized[:-3].reshape(7, 11, 2)[2:5, 4:7]
    np.testing.assert_allclose(after, before, rtol=1e-6)
    assert resize_biases(table, source_grid=(2, 3), target_grid=(2, 3)) is table


def test_a_single_row_has_one_distance():
    table = np.arange(8, dtype=np.float32).reshape(8, 1)
    resized = resize_biases(table, source_grid=(1, 3), target_grid=(2, 3))[:-3].reshape(3, 5)
    np.testing.assert_allclose(resized[0], resized[1])
    np.testing.assert_allclose(resized[1, 1:4], [1, 2, 3], atol=1e-6)
