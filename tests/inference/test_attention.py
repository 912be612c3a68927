# SPDX-License-Identifier: Apache-2.0
"""Attention rollout and distances against closed forms."""

import numpy as np
import pytest

from vit_jax.inference.attention import (
    cosine_similarity,
    image_row,
    mean_distances,
    principal_components,
    rollout,
)


def test_rollout_of_uniform_attention_has_a_closed_form():
    layers, length = 3, 5
    uniform = np.full((length, length), 1 / length)
    # U U = U, so the product of (U + 1) / 2 is U but for 2^-layers of the identity.
    expected = (1 - 2.0**-layers) * uniform + 2.0**-layers * np.eye(length)
    np.testing.assert_allclose(rollout(np.tile(uniform, (layers, 2, 1, 1))), expected, atol=1e-12)


def test_rollout_multiplies_later_layers_from_the_left_after_averaging_heads():
    attention = np.random.default_rng(0).dirichlet(np.ones(4), (2, 3, 4))
    first, second = (heads.mean(axis=0) / 2 + np.eye(4) / 2 for heads in attention)
    np.testing.assert_allclose(rollout(attention), second @ first, atol=1e-12)
    np.testing.assert_allclose(rollout(attention).sum(axis=1), 1, atol=1e-12)


def test_the_class_token_stands_for_the_image_or_else_the_mean_of_patches():
    weights = np.arange(16.0).reshape(4, 4)
    np.testing.assert_array_equal(image_row(weights, num_class_tokens=1, prefix=2), [2, 3])
    np.testing.assert_array_equal(image_row(weights, num_class_tokens=0, prefix=1), [9, 10, 11])


@pytest.mark.parametrize(("to_patches", "expected"), [([0.5, 0.5], 2.0), ([0.2, 0.2], 2.0)])
def test_distances_are_in_pixels_and_among_patches(to_patches, expected):
    # A class token and two patches side by side, 4 pixels apart; whatever the token gets.
    row = [1 - sum(to_patches), *to_patches]
    attention = np.tile(row, (1, 1, 3, 1))
    found = mean_distances(attention, prefix=1, grid=(1, 2), stride=(8, 4))
    np.testing.assert_allclose(found, [[expected]])


def test_similarity_is_the_cosine():
    found = cosine_similarity(np.array([[2.0, 0], [1, 1], [0, 0]]))
    np.testing.assert_allclose(found, [[1, 0.5**0.5, 0], [0.5**0.5, 1, 0], [0, 0, 0]], atol=1e-12)


def test_components_are_in_order_of_variance_and_keep_distances():
    x = np.random.default_rng(0).normal(size=(20, 3)) * [1, 10, 3] + 5
    components, places = principal_components(x, 3)
    assert np.abs(components).argmax(axis=1).tolist() == [1, 2, 0]
    np.testing.assert_allclose(places @ components, x - x.mean(axis=0), atol=1e-9)
    assert principal_components(x, 2)[1].shape == (20, 2)
