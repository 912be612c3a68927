# SPDX-License-Identifier: Apache-2.0
"""Corruptions of images, by what each does to plain ones."""

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from vit_jax.data.ops.corruptions import KINDS, SEVERITIES, Corrupt
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.utils.errors import UserError

GRAY = np.full((224, 224, 3), 128, np.uint8)
PHOTO = np.ascontiguousarray(load_sample_images().images[0][100:212, 200:312])


def corrupt(image, kind, severity=3, seed=0):
    return Corrupt(kind, severity).change(image, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_for_the_same_draw(kind):
    one, same, other = (corrupt(PHOTO, kind, seed=seed) for seed in (0, 0, 1))
    assert (one.shape, one.dtype) == (PHOTO.shape, np.uint8)
    np.testing.assert_array_equal(one, same)
    drawn = kind not in {
        "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression",
    }  # fmt: skip
    assert np.array_equal(one, other) != drawn
    assert np.abs(one.astype(float) - PHOTO).mean() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_size_and_pure_colours_can_be_corrupted(kind):
    for shape in ((1, 1, 3), (8, 9, 3), (3, 40, 3)):
        for fill in (0, 255):
            image = np.full(shape, fill, np.uint8)
            assert all(corrupt(image, kind, s).shape == shape for s in SEVERITIES)


@pytest.mark.parametrize(
    ("kind", "errors"),
    # Standard deviations by the published rows: of the normal distribution, and of a Poisson
    # distribution of 128 / 255 times the photons. Wider ones are cut off at 0 and 1.
    [
        ("gaussian_noise", [0.08, 0.12, 0.18]),
        ("shot_noise", [np.sqrt(128 / 255 / n) for n in (60, 25)]),
    ],
)
def test_noise_has_the_published_deviation(kind, errors):
    for severity, want in enumerate(errors, 1):
        noise = corrupt(GRAY, kind, severity).astype(float) / 255 - 128 / 255
        np.testing.assert_allclose(noise.std(), want, rtol=0.03)


def test_impulses_are_black_and_white_in_equal_shares():
    for severity, share in enumerate((0.03, 0.06, 0.09, 0.17, 0.27), 1):
        noisy = corrupt(GRAY, "impulse_noise", severity)
        np.testing.assert_allclose((noisy == 0).mean(), share / 2, rtol=0.05)
        np.testing.assert_allclose((noisy == 255).mean(), share / 2, rtol=0.05)
        assert (noisy == 128).mean() > 1 - share * 1.05


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"])
def test_a_blur_leaves_a_plain_image_as_it_is_and_flattens_edges(kind):
    assert np.abs(corrupt(GRAY, kind, 5).astype(int) - 128).max() <= 1
    edges = [np.abs(np.diff(corrupt(PHOTO, kind, s).astype(float), axis=1)).mean() for s in (1, 5)]
    assert edges[1] < edges[0] < np.abs(np.diff(PHOTO.astype(float), axis=1)).mean()


def test_a_defocused_point_becomes_a_disk_of_the_published_radius():
    point = np.zeros((224, 224, 3), np.uint8)
    point[112, 112] = 255
    disk = corrupt(np.maximum(point, 0), "defocus_blur", 1)[..., 0] > 0
    rows = np.flatnonzero(disk.any(axis=1))
    assert rows.min() >= 112 - 4
    assert rows.max() <= 112 + 4
    assert disk[109:116, 112].all()


def test_lengths_scale_with_the_image():
    small, large = np.zeros((56, 56, 3), np.uint8), np.zeros((448, 448, 3), np.uint8)
    small[28:] = large[224:] = 255
    widths = [
        np.count_nonzero((x := corrupt(image, "defocus_blur", 5)[:, 0, 0]) * (x < 250))
        for image in (small, large)
    ]
    assert 6 < widths[1] / widths[0] < 10


def test_brightness_and_contrast_follow_their_formulas():
    # HSV: the largest channel rises by 0.3, and the others with it.
    image = np.tile(np.array([100, 50, 0], np.uint8), (4, 4, 1))
    factor = (100 / 255 + 0.3) / (100 / 255)
    np.testing.assert_allclose(
        corrupt(image, "brightness", 3)[0, 0], [100 * factor, 50 * factor, 0], atol=1
    )
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = 200  # The mean is 100.
    np.testing.assert_allclose(corrupt(image, "contrast", 3)[:, 0, 0], [120, 80], atol=1)


def test_the_line_of_preprocessing_names_what_is_not_there():
    *_, op = parse_preprocess("decode|corrupt('fog', 2)", key="k")
    assert op == Corrupt("fog", 2)
    for text, want in (
        ("corrupt('frost')", "photographs of frost"),
        ("corrupt('blur')", "expected one of gaussian_noise"),
        ("corrupt('fog', 6)", "whole number from 1 to 5"),
    ):
        with pytest.raises(UserError, match=want):
            parse_preprocess(f"decode|{text}", key="k")


@pytest.mark.parametrize("kind", ["glass_blur", "elastic_transform", "snow", "defocus_blur"])
def test_small_images_are_corrupted_like_large_ones(kind):
    rng = np.random.default_rng(0)
    # Structure at all scales, and few pixels that are black or white.
    large = sum(
        cv2.resize(rng.normal(0, 1, (side, side, 3)), (224, 224)) for side in (4, 8, 16, 32, 64)
    )
    large = np.clip(110 + 25 * large, 0, 255).astype(np.uint8)
    small = cv2.resize(large, (32, 32), interpolation=cv2.INTER_AREA)
    for severity in SEVERITIES:
        corrupted = Corrupt(kind, severity)
        changed = cv2.resize(corrupted.change(large, rng), (32, 32), interpolation=cv2.INTER_AREA)
        expected = np.abs(changed.astype(float) - small).mean()
        found = np.abs(corrupted.change(small, rng).astype(float) - small).mean()
        assert expected / 2 - 1 < found < 2 * expected + 1, severity
