# SPDX-License-Identifier: Apache-2.0
"""The first convolution under other patches and other channels."""

import cv2
import numpy as np
import pytest

from vit_jax.checkpoint.pretrained.embedding import change_channels, resize_patches
from vit_jax.utils.errors import UserError


def random_kernel(height, width, channels=3, features=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(height, width, channels, features)).astype(np.float32)


def embed(patch, kernel):
    return np.einsum("ijc,ijcf->f", patch, kernel)


@pytest.mark.parametrize("size", [(16, 16), (12, 9), (8, 20)])
def test_an_enlarged_patch_has_the_embedding_of_the_original(size):
    kernel = random_kernel(8, 6)
    patch = np.random.default_rng(1).normal(size=(8, 6, 3)).astype(np.float32)
    enlarged = cv2.resize(patch, size[::-1], interpolation=cv2.INTER_LINEAR)
    got = embed(enlarged, resize_patches(kernel, size))
    np.testing.assert_allclose(got, embed(patch, kernel), atol=1e-4)


def test_a_smaller_patch_has_the_least_squares_embedding():
    kernel = random_kernel(8, 8)
    smaller = resize_patches(kernel, (4, 4))
    assert smaller.shape == (4, 4, 3, 5)
    # Of a patch that loses nothing by the reduction: one that was enlarged by two.
    columns = np.stack(
        [
            cv2.resize(x, (4, 4), interpolation=cv2.INTER_LINEAR).ravel()
            for x in np.eye(64).reshape(64, 8, 8)
        ]
    )
    want, *_ = np.linalg.lstsq(columns, kernel.reshape(64, -1), rcond=None)
    np.testing.assert_allclose(smaller.reshape(16, -1), want, atol=1e-5)


def test_the_same_size_changes_nothing():
    kernel = random_kernel(4, 4)
    np.testing.assert_allclose(resize_patches(kernel, (4, 4)), kernel, atol=1e-6)


def test_one_channel_takes_grey_images_as_three_equal_ones():
    kernel = random_kernel(4, 4)
    grey = np.random.default_rng(1).normal(size=(4, 4, 1))
    got = embed(grey, change_channels(kernel, 1))
    np.testing.assert_allclose(got, embed(np.repeat(grey, 3, axis=2), kernel), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 6), (1, 4)])
def test_more_equal_channels_give_what_fewer_gave(old, new):
    kernel = random_kernel(4, 4, channels=old)
    grey = np.random.default_rng(1).normal(size=(4, 4, 1))
    changed = change_channels(kernel, new)
    assert changed.shape == (4, 4, new, 5)
    got = embed(np.repeat(grey, new, axis=2), changed)
    np.testing.assert_allclose(got, embed(np.repeat(grey, old, axis=2), kernel), atol=1e-5)


def test_five_channels_repeat_three_in_turn():
    kernel = random_kernel(2, 2)
    changed = change_channels(kernel, 5)
    np.testing.assert_allclose(changed, kernel[:, :, [0, 1, 2, 0, 1]] * np.float32(0.6), rtol=1e-6)


def test_fewer_channels_but_more_than_one_are_refused():
    with pytest.raises(UserError, match="takes 4 channels, this one 2"):
        change_channels(random_kernel(2, 2, channels=4), 2)
