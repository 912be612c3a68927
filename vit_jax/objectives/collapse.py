# SPDX-License-Identifier: Apache-2.0
"""Measures by which a collapse of self-supervised features is seen."""

import jax
import jax.numpy as jnp


def entropy(targets: jax.Array) -> jax.Array:
    """Returns the entropy in nats of distributions: float32 `[..., n]` to `[...]`."""
    return -(targets * jnp.log(jnp.maximum(targets, 1e-30))).sum(axis=-1)


def participation_ratio(features: jax.Array) -> jax.Array:
    """Returns how many directions features use, a float32 scalar from 1 to the width.

    With the eigenvalues λ of the products of rows of `features`, float `[rows, width]`, this is
    (Σ λ)² / Σ λ². It needs no decomposition, and is at most the RankMe of arXiv:2210.02885.
    """
    x = features.astype(jnp.float32)
    # The smaller of both matrices, which have the same eigenvalues.
    products = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return jnp.square(jnp.trace(products)) / jnp.maximum(jnp.square(products).sum(), 1e-30)


def patch_cosines(patches: jax.Array) -> jax.Array:
    """Returns the mean cosine of two different patches of each image, float32 `[batch]`.

    `patches` are float `[batch, patches, width]`.
    """
    x = patches.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    count = x.shape[1]
    # The sum over all pairs, and without those of a patch with itself.
    total = jnp.square(x.sum(axis=1)).sum(axis=-1) - jnp.square(x).sum(axis=(1, 2))
    return total / max(count * (count - 1), 1)


def mean_cosine(patches: jax.Array) -> jax.Array:
    """Returns the mean of `patch_cosines`, a float32 scalar."""
    return patch_cosines(patches).mean()
