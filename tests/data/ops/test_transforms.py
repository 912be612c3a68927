# SPDX-License-Identifier: Apache-2.0
"""Operations treat an image and its label map as one."""

import numpy as np
import pytest

from vit_jax.data.ops.transforms import OPS, RandomScale, apply
from vit_jax.data.pipeline import find_shapes
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.utils.errors import UserError

# The red channel has the class, so that an image shows how its map is to be moved.
MAP = np.random.default_rng(0).integers(0, 100, (24, 36)).astype(np.uint8)
IMAGE = np.stack([MAP, MAP, MAP], axis=-1)


def run(line, seed=0):
    features = {"image": IMAGE, "label_map": MAP}
    return apply(parse_preprocess(line, key="k"), features, np.random.default_rng(seed))


@pytest.mark.parametrize(
    "line",
    [
        "decode|resize(12, 20, method='nearest')",
        "resize_small(12, 'nearest')",
        "resize_long(20, 'nearest')",
        "central_crop(10, 14)",
        "random_crop(10)",
        "inception_crop(16, method='nearest')",
        "random_scale(16, method='nearest')|pad_to(40, 60, 255)|random_crop(16)",
        "pad(3, 255)",
        "pad(3, mode='reflect')",
        "pad_to(40, value=255)",
        "flip_lr",
        "random_shift(5)",
    ],
)
def test_maps_move_as_their_images_do(line):
    for seed in range(4):
        features = run(line, seed)
        assert features["label_map"].shape == features["image"].shape[:2]
        np.testing.assert_array_equal(features["label_map"], features["image"][..., 0])


def test_maps_are_not_interpolated_and_padding_is_ignored():
    features = run("resize(50, 70)|pad(2)")
    assert set(np.unique(features["label_map"])) <= {*np.unique(MAP), 255}
    assert (features["label_map"][:2] == 255).all()
    assert (features["image"][:2] == 0).all()


def test_random_numbers_of_later_operations_do_not_depend_on_maps():
    line = "inception_crop(16)|flip_lr|random_shift(2)|color_jitter(0.4)"
    ops, rng = parse_preprocess(line, key="k"), np.random.default_rng(1)
    alone = apply(ops, {"image": IMAGE}, rng)["image"]
    np.testing.assert_array_equal(run(line, 1)["image"], alone)


@pytest.mark.parametrize("line", ["color_jitter(0.4)", "grayscale", "three_augment", "solarize"])
def test_changes_of_colour_keep_maps(line):
    np.testing.assert_array_equal(run(line)["label_map"], MAP)


@pytest.mark.parametrize("op", ["randaug(2, 10)", "auto_augment", "rand_augment('rand-m9')"])
def test_policies_that_move_pixels_are_refused_with_masks(op):
    with pytest.raises(
        UserError, match=r"data\.preprocess: .* can't be applied to images with masks"
    ):
        find_shapes(f"decode|{op}", (8, 8, 3), key="data.preprocess", with_maps=True)


def test_each_operation_says_what_it_does_with_maps():
    assert {name for name, op in OPS.items() if op.maps == "refuse"} == {"decode", "keep"}


def test_random_scale_draws_the_shorter_side():
    sizes = {
        RandomScale(20, 0.5, 1.5)({"image": IMAGE}, np.random.default_rng(seed))["image"].shape[:2]
        for seed in range(50)
    }
    short = [min(size) for size in sizes]
    assert min(short) >= 10
    assert max(short) <= 30
    assert len(set(short)) > 8
    assert all(abs(width / height - 1.5) < 0.1 for height, width in sizes)
