# SPDX-License-Identifier: Apache-2.0
"""Pictures of the principal components of patches."""

import numpy as np

from vit_jax.evaluators.patches import color_patches


def test_patches_alike_have_one_colour():
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(4, 7))
    which = rng.integers(0, 4, (3, 5, 2))
    patches = kinds[which] + 1e-4 * rng.normal(size=(3, 5, 2, 7))
    picture = color_patches(patches.astype(np.float32), (20, 8))
    assert picture.shape == (3, 20, 8, 3)
    # Each patch has 4 x 4 pixels of its colour.
    cells = picture.reshape(3, 5, 4, 2, 4, 3)
    assert (cells == cells[:, :, :1, :, :1]).all()
    colors = cells[:, :, 0, :, 0]
    means = np.stack([colors[which == kind].mean(axis=0) for kind in range(4)])
    for kind in range(4):
        assert np.abs(colors[which == kind] - means[kind]).max() < 1
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1) + 999 * np.eye(4)
    assert apart.min() > 60
    # Signs of directions are chosen: the same picture from any solver, and for mirrored features.
    np.testing.assert_allclose(
        color_patches(patches[..., ::-1].astype(np.float32), (20, 8)), picture, atol=1e-6
    )


def test_narrow_and_constant_features_have_a_picture():
    constant = color_patches(np.ones((1, 2, 2, 5), np.float32), (4, 4))
    assert np.isfinite(constant).all()
    narrow = color_patches(np.arange(8.0).reshape(1, 2, 2, 2), (4, 4))
    assert narrow.shape == (1, 4, 4, 3)
    assert not narrow[..., 2].any()
