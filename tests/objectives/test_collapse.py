# SPDX-License-Identifier: Apache-2.0
"""Measures of a collapse: closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.objectives.collapse import entropy, mean_cosine, participation_ratio


def test_entropy_is_that_of_uniform_and_peaked_distributions():
    targets = jnp.asarray([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(entropy(targets), np.log([4, 1, 2]), atol=1e-6)


@pytest.mark.parametrize("shape", [(30, 8), (5, 20)])
def test_participation_ratio_counts_directions_and_is_at_most_rankme(shape):
    x = np.random.default_rng(0).normal(size=shape) * np.linspace(0.2, 2, shape[1])
    singular = np.linalg.svd(x, compute_uv=False)
    want = (singular**2).sum() ** 2 / (singular**4).sum()
    got = float(participation_ratio(jnp.asarray(x)))
    assert got == pytest.approx(want, rel=1e-5)
    p = singular / singular.sum()
    assert got <= np.exp(-(p * np.log(p)).sum())
    assert float(participation_ratio(jnp.ones((6, 3)))) == pytest.approx(1, rel=1e-5)
    assert float(participation_ratio(jnp.eye(3))) == pytest.approx(3, rel=1e-5)


def test_mean_cosine_is_over_pairs_of_different_patches():
    x = np.random.default_rng(0).normal(size=(2, 5, 4))
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    cosines = unit @ unit.transpose(0, 2, 1)
    want = np.mean([cosines[i][~np.eye(5, dtype=bool)].mean() for i in range(2)])
    assert float(mean_cosine(jnp.asarray(x))) == pytest.approx(want, rel=1e-5)
    assert float(mean_cosine(jnp.ones((1, 3, 2)))) == pytest.approx(1, rel=1e-5)
