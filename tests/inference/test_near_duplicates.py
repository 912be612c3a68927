# SPDX-License-Identifier: Apache-2.0
"""Pairs of similar features."""

import numpy as np
import pytest

from vit_jax.inference import near_duplicates
from vit_jax.inference.near_duplicates import center, find_pairs, sketch


@pytest.fixture
def rows():
    """Unit vectors of which some are near each other."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 8))
    rows[[7, 30, 49]] = rows[[3, 3, 0]] + rng.normal(0, 0.02, (3, 8))
    return center(rows.astype(np.float32))


@pytest.mark.parametrize("block", [1, 7, 50, 64])
def test_each_pair_above_the_threshold_is_found_once(rows, block, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_BLOCK", block)
    found = find_pairs(rows, 0.9, limit=100)
    products = rows.astype(np.float64) @ rows.T.astype(np.float64)
    expected = {(int(i), int(j)) for i, j in np.argwhere(products >= 0.9) if i < j}
    assert {(0, 49), (3, 7), (7, 30), (3, 30)} <= expected
    pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(pairs) == len(expected) == found.total
    assert set(pairs) == expected
    cosines = [products[pair] for pair in pairs]
    np.testing.assert_allclose(found.cosine, cosines, rtol=1e-5)
    assert (np.diff(found.cosine) <= 0).all()


def test_the_most_similar_pairs_are_kept(rows, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_BLOCK", 5)
    everything = find_pairs(rows, -1, limit=10**6)
    few = find_pairs(rows, -1, limit=10)
    assert (everything.total, few.total) == (50 * 49 // 2,) * 2
    np.testing.assert_array_equal(few.cosine, everything.cosine[:10])


def test_a_sketch_keeps_distances():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 30, 400)).astype(np.float32)
    short = sketch(rows, 1024)
    assert short.shape == (20, 1024)
    flat = rows.reshape(20, -1)
    for i in range(1, 20):
        before, after = (np.sum((x[0] - x[i]) ** 2) for x in (flat, short))
        assert abs(after / before - 1) < 6 * np.sqrt(2 / 1024)
    np.testing.assert_array_equal(sketch(rows[:, :2, :5], 10), rows[:, :2, :5].reshape(20, -1))


def test_rows_that_equal_the_mean_are_similar_to_nothing():
    assert find_pairs(center(np.ones((5, 3), np.float32)), 0.5, limit=10).total == 0
