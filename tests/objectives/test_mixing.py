# SPDX-License-Identifier: Apache-2.0
"""Mixup, CutMix and the choice between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.objectives.mixing import cutmix, mix, mixup

HEIGHT, WIDTH = 12, 20
# Example i has pixels of value i, so that a result tells where each pixel is from.
IMAGES = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], (4, HEIGHT, WIDTH, 3))
KEYS = jax.random.split(jax.random.key(0), 500)


def test_mixup_blends_neighbours_and_their_labels_alike():
    images = jnp.eye(4).reshape(4, 2, 2, 1)
    mixed, targets = mixup(jax.random.key(3), images, jnp.eye(4), alpha=1.0)
    weight = float(targets[0, 0])
    assert 0.5 <= weight < 1
    np.testing.assert_allclose(
        targets, weight * np.eye(4) + (1 - weight) * np.roll(np.eye(4), 1, 0)
    )
    np.testing.assert_allclose(mixed.reshape(4, 4), targets)


@jax.jit
def run_cutmix(alpha):
    return jax.vmap(lambda key: cutmix(key, IMAGES, jnp.eye(4), alpha=alpha))(KEYS)


@functools.cache
def many(alpha):
    """Images and targets of 500 keys."""
    return jax.tree.map(np.asarray, run_cutmix(alpha))


def test_cutmix_puts_a_box_of_the_neighbour_into_each_image():
    images, _ = many(1.0)
    boxes = images[:, 1, ..., 0] == 0  # example 1 has its neighbour's pixels there
    assert (boxes | (images[:, 1, ..., 0] == 1)).all()
    rows, columns = boxes.any(2), boxes.any(1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] & columns[:, None])
    for used in (rows, columns):
        assert (np.abs(np.diff(used.astype(int), axis=1)).sum(1) <= 2).all()  # in one piece
    # One box a batch: the same in the other examples.
    for i in (0, 2, 3):
        np.testing.assert_array_equal(images[:, i, ..., 0] == (i - 1) % 4, boxes)


def test_cutmix_weights_targets_by_the_area_that_is_left():
    images, targets = many(1.0)
    own = (images[:, 2, ..., 0] == 2).mean((1, 2))
    np.testing.assert_allclose(targets[:, 2, 2], own, atol=1e-6)
    np.testing.assert_allclose(targets[:, 2, 1], 1 - own, atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)


def test_cutmix_draws_areas_from_beta_and_centres_from_the_whole_image():
    images, _ = many(1.0)
    boxes = images[:, 1, ..., 0] == 0
    rows, columns = boxes.any(2), boxes.any(1)
    inside = ~rows[:, 0] & ~rows[:, -1] & ~columns[:, 0] & ~columns[:, -1]
    height, width = rows.sum(1), columns.sum(1)
    # Not cut off at a border, a box has the image's aspect, but for rounding to even sides.
    assert (np.abs(height / HEIGHT - width / WIDTH)[inside] < 2 / HEIGHT).all()
    # The mean share under uniform Beta and a centre anywhere, by a sum over all boxes.
    share = np.sqrt(np.linspace(0.0005, 0.9995, 1000))
    expected = np.ones(1000)
    for side in (HEIGHT, WIDTH):
        half = np.floor(np.floor(side * share) / 2)[:, None]
        centre = np.arange(side)
        kept = np.minimum(centre + half, side) - np.maximum(centre - half, 0)
        expected *= kept.mean(1) / side
    assert boxes.mean() == pytest.approx(expected.mean(), abs=0.03)


def test_a_large_alpha_cuts_half_of_the_area():
    images, _ = many(1e4)
    box = (images[:, 1, ..., 0] == 0).sum((1, 2)).max()
    assert box == 8 * 14  # sides of 12 and 20 times the root of 1/2, made even


@jax.jit
def run_switched(probability):
    run = functools.partial(mix, mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=probability)
    return jax.vmap(lambda key: run(key, IMAGES, jnp.eye(4)))(KEYS)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_a_step_uses_cutmix_with_the_switch_probability(probability):
    images, targets = jax.tree.map(np.asarray, run_switched(probability))
    first = images[:, 1]  # between 0 and 1: fractions are mixup's
    by_mixup = ((first > 0) & (first < 1)).any((1, 2, 3))
    assert 1 - by_mixup.mean() == pytest.approx(probability, abs=0.06)
    np.testing.assert_allclose(targets[:, 1, 1], first.mean((1, 2, 3)), atol=1e-5)


def test_one_of_them_alone_is_itself_and_none_changes_nothing():
    key, targets = jax.random.key(1), jnp.eye(4)
    run = functools.partial(mix, key, IMAGES, targets, switch_prob=0.5)
    for got, want in (
        (run(mixup_alpha=0.3, cutmix_alpha=0), mixup(key, IMAGES, targets, alpha=0.3)),
        (run(mixup_alpha=0, cutmix_alpha=0.7), cutmix(key, IMAGES, targets, alpha=0.7)),
        (run(mixup_alpha=0, cutmix_alpha=0), (IMAGES, targets)),
    ):
        jax.tree.map(np.testing.assert_array_equal, got, want)
