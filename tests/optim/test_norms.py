# SPDX-License-Identifier: Apache-2.0
"""Norms over many arrays are those of numpy in float64, however the arrays share kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.optim import norms as norms_lib
from vit_jax.optim.norms import clip_by_global_norm, global_norm, norms

# Small ones, and large ones of all numbers of dimensions; some are alike.
SHAPES = ((), (3,), (7,), (0, 4), (9000,), (9000,), (2, 3), (1, 8193), (600, 20), (4, 5, 600))
SHAPES += ((600, 20), (600, 20), (600, 20), (2, 2, 40, 60), (2, 2, 40, 60))


def make(shapes=SHAPES, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def exact(arrays):
    return np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in arrays))


@pytest.mark.parametrize(
    "where", [{}, {"updated": True}, {"sharded": True}], ids=["plain", "updated", "sharded"]
)
@pytest.mark.parametrize("together", [1, 24_000, 2**23])
def test_norms_are_those_of_float64(together, where, monkeypatch):
    monkeypatch.setattr(norms_lib, "_STACKED", together)
    arrays = [*make(), *make(((600, 20), (5,)), jnp.bfloat16)]
    groups = [arrays[:5], arrays[5:12], arrays[12:]]
    got = norms(groups, **where)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [exact(group) for group in groups], rtol=1e-6)
    whole = global_norm({"a": arrays[:3], "b": tuple(arrays[3:])}, **where)
    np.testing.assert_allclose(whole, exact(arrays), rtol=1e-6)


def test_arrays_that_are_alike_are_read_together():
    program = jax.jit(global_norm).lower(make(24 * ((600, 20),))).as_text()
    assert program.count("stablehlo.reduce(") == 2  # of the rows of all, and of what is left


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_gradients_are_clipped_as_by_optax(max_norm):
    grads = [*make(), *make(((5,),), jnp.bfloat16)]
    ours, theirs = (
        tx.update(grads, tx.init(grads))[0]
        for tx in (clip_by_global_norm(max_norm), optax.clip_by_global_norm(max_norm))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), rtol=1e-6)
