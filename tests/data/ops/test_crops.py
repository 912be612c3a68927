# SPDX-License-Identifier: Apache-2.0
"""Crops have the distributions of the libraries that recipes name."""

import functools
from pathlib import Path

import numpy as np
import pytest

from vit_jax.data.ops.crops import DRAWS
from vit_jax.data.ops.transforms import InceptionCrop

TESTDATA = Path(__file__).parents[2] / "testdata"
# Of a Kolmogorov-Smirnov test of this many draws: 0.025 is exceeded once in 100,000 times.
COUNT, LIMIT = 10_000, 0.025

# The cases of make_tensorflow_golden.py and make_timm_augment_golden.py, as lines have them.
TENSORFLOW = (
    ((300, 400), (5, 100)),
    ((400, 300), (5, 100)),
    ((224, 224), (5, 100)),
    ((97, 131), (5, 100)),
    ((60, 400), (5, 100)),
    ((8, 11), (5, 100)),
    ((2, 3), (5, 100)),
    ((1, 1), (5, 100)),
    ((200, 150), (20, 60, 0.5, 2.0)),
)
TORCH = (((300, 400), (8,)), ((224, 224), (20,)), ((60, 400), (8,)), ((9, 4), (8,)))
CASES = (
    *(("tensorflow", "tensorflow", i, *case) for i, case in enumerate(TENSORFLOW)),
    *(("torchvision", "tv", i, *case) for i, case in enumerate(TORCH)),
    *(("torchvision", "timm", i, *case) for i, case in enumerate(TORCH)),
    *(("byol", "byol", i, *case) for i, case in enumerate(TORCH)),
)


@functools.cache
def golden(folder):
    return dict(np.load(TESTDATA / folder / "crops.npz"))


@functools.cache
def draw(variant, shape, arguments, count=COUNT):
    op, rng = InceptionCrop(8, *arguments, variant=variant), np.random.default_rng(1)
    return np.array([op.draw(*shape, rng) for _ in range(count)])


def distance(values, counts):
    """The largest difference of the cumulative distributions of whole numbers."""
    ours = np.cumsum(np.bincount(values, minlength=len(counts))) / len(values)
    return np.abs(ours - np.cumsum(counts) / counts.sum()).max()


def area_distance(crops, quantiles, shape):
    """The same of the share of the area, at the thousandths of the reference."""
    share = np.sort(crops[:, 2] * crops[:, 3] / np.prod(shape)).astype(np.float32)
    # A share may occur many times; the last of the same is the value of the distribution.
    below = np.searchsorted(share, quantiles, side="right") / len(share)
    rank = np.searchsorted(quantiles, quantiles, side="right") / len(quantiles)
    return np.abs(below - rank).max()


@pytest.mark.parametrize(("variant", "name", "number", "shape", "arguments"), CASES, ids=str)
def test_crops_have_the_distribution_of_their_variant(variant, name, number, shape, arguments):
    arrays = golden("tensorflow" if variant == "tensorflow" else "torch")
    prefix = "" if variant == "tensorflow" else f"{name} "
    separator = "_" if variant == "tensorflow" else " "
    crops = draw(variant, shape, arguments)
    counts = arrays[f"{prefix}counts{separator}{number}"]
    quantiles = arrays[f"{prefix}area{separator}{number}"]
    for what, values, expected in zip("tlhw", crops.T, counts, strict=True):
        assert distance(values, expected) < LIMIT, what
    assert area_distance(crops, quantiles, shape) < LIMIT


def test_the_variants_are_told_apart():
    counts = golden("tensorflow")["counts_0"]
    for variant in DRAWS.keys() - {"tensorflow"}:
        crops = draw(variant, (300, 400), (5, 100), 4000)
        assert distance(crops[:, 2], counts[2]) > 3 * LIMIT
    torch = golden("torch")["tv area 2"]
    assert area_distance(draw("uniform", (60, 400), (8,), 4000), torch, (60, 400)) > 3 * LIMIT


@pytest.mark.parametrize("variant", DRAWS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 200), (300, 1), (5, 4)], ids=str)
def test_crops_of_any_image_are_inside(variant, shape):
    for arguments in ((5,), (100,), (0.01, 0.02), (60, 70, 3, 4)):
        top, left, height, width = draw(variant, shape, arguments, 200).T
        assert min(top.min(), left.min()) >= 0
        assert min(height.min(), width.min()) >= 1
        assert (top + height).max() <= shape[0]
        assert (left + width).max() <= shape[1]


def test_tensorflow_never_takes_the_last_row_and_column_of_a_smaller_part():
    top, left, height, width = draw("tensorflow", (97, 131), (5, 100)).T
    smaller = (height < 97) & (width < 131)
    assert (top + height)[smaller].max() == 96
    assert (left + width)[smaller].max() == 130


def test_the_uniform_crop_draws_what_it_always_did():
    # Runs of earlier versions resume with these.
    op, rng = InceptionCrop(224), np.random.Generator(np.random.Philox(3))
    found = [op.draw(300, 400, rng) for _ in range(3)]
    assert found == [(106, 64, 116, 96), (1, 8, 297, 389), (3, 5, 295, 381)]
