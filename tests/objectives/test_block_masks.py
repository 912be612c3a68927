# SPDX-License-Identifier: Apache-2.0
"""Masks of blocks: their numbers, their shapes and the places of their patches."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from vit_jax.objectives.block_masks import BlockMasks, gather_masked


@pytest.mark.parametrize(
    ("grid", "images", "ratio"),
    [((14, 14), 32, (0.1, 0.5)), ((4, 4), 6, (0.1, 0.5)), ((7, 5), 16, (0.3, 0.3))],
)
def test_half_of_the_images_have_masks_of_all_ratios(grid, images, ratio):
    masks = BlockMasks(grid, ratio, 0.5)
    group = masks.group(images)
    drawn = np.asarray(masks.draw(jax.random.key(0), images))
    counts = drawn.sum(axis=1).reshape(-1, group)
    patches = np.prod(grid)
    assert ((counts > 0).sum(axis=1) == group // 2).all()
    assert counts.max() <= patches * ratio[1] + 1e-6
    assert counts[counts > 0].min() >= max(1, int(patches * ratio[0] + 1e-6))
    assert (counts.sum(axis=1) <= masks.capacity(group)).all()
    # One ratio from each part of the range.
    for row in np.sort(counts, axis=1)[:, group // 2 :]:
        ends = np.linspace(*ratio, group // 2 + 1)
        assert (row <= patches * ends[1:] + 1e-6).all()
        assert (row >= np.floor(patches * ends[:-1]) - 1e-6).all()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("images", [2, 12, 48, 50, 66, 74, 80])
def test_any_number_of_images_has_the_share_of_masks_as_near_as_a_group_allows(images, share):
    masks = BlockMasks((4, 4), (0.1, 0.5), share)
    group = masks.group(images)
    assert images % group == 0
    assert group >= min(16, images)
    rounding = 1 if group == 16 else 0.5
    assert abs(masks.masked(group) - share * group) <= max(rounding, 1 - share * group) + 1e-9


def test_the_masks_of_a_batch_of_an_odd_size_have_their_share():
    masks = BlockMasks((4, 4), (0.1, 0.5), 0.9)
    drawn = np.asarray(masks.draw(jax.random.key(0), 66))
    counts = drawn.sum(axis=1).reshape(3, 22)
    np.testing.assert_array_equal((counts > 0).sum(axis=1), 20)
    assert (counts.sum(axis=1) <= masks.capacity(22)).all()


def test_the_masks_of_groups_of_16_stay_the_same():
    for share, count in ((0.5, 8), (0.6, 9), (0.9, 14), (0.01, 1), (1.0, 16)):
        masks = BlockMasks((4, 4), (0.1, 0.5), share)
        assert {masks.group(images) for images in (16, 32, 176)} == {16}
        assert masks.masked(16) == count


def test_masks_are_blocks():
    """Most masked patches have a masked neighbour, unlike those of random patches."""
    drawn = np.asarray(BlockMasks((14, 14), (0.1, 0.5), 0.5).draw(jax.random.key(1), 64))
    pieces = [ndimage.label(m.reshape(14, 14))[1] for m in drawn if m.any()]
    counts = drawn.sum(axis=1)[drawn.any(axis=1)]
    rng = np.random.default_rng(0)
    single = [ndimage.label(rng.permutation(196).reshape(14, 14) < c)[1] for c in counts]
    assert np.mean(pieces) < 0.3 * np.mean(single)


def test_masks_are_a_function_of_the_key():
    masks = BlockMasks((4, 4), (0.1, 0.5), 0.5)
    one, again, other = (np.asarray(masks.draw(jax.random.key(i), 16)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_masked_patches_are_gathered_with_weights_of_their_images():
    masks = np.zeros((2, 2, 4), bool)
    masks[0, 0, [1, 3]] = masks[0, 1, 2] = masks[1, 1, [0, 1, 2]] = True
    indices, valid, weights = map(np.asarray, gather_masked(masks, 4))
    np.testing.assert_array_equal(valid.sum(axis=1), [3, 3])
    assert set(indices[0][valid[0]]) == {1, 3, 6}
    assert set(indices[1][valid[1]]) == {4, 5, 6}
    np.testing.assert_allclose(weights[0], [0.5, 0.5, 1, 0])
    np.testing.assert_allclose(weights[1], [1 / 3] * 3 + [0])
