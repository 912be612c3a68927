# SPDX-License-Identifier: Apache-2.0
"""Norms over many arrays, in few kernels.

A GPU takes about as long to start a kernel as to read ten megabytes, so a kernel for each array, of
which most are biases and scales, takes longer than reading them all.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Arrays of at most as many values are read by one kernel together.
_SMALL = 8192
# A larger array is reduced to at least as many sums, where its shape permits.
_MIN_SUMS = 512
# Large arrays of one shape are read by one kernel until they have as many values.
_STACKED = 8 * 2**20


def global_norm(tree: Any, *, sharded: bool = False, updated: bool = False) -> jax.Array:
    """The square root of the sum of squares over all leaves, a float32 scalar.

    Args:
      tree: leaves are real arrays of any shape and dtype.
      sharded: whether leaves are split over devices; then no kernel is shared, because what XLA
        gathers for that takes longer.
      updated: whether another kernel has just computed the leaves, and can sum their squares too.
    """
    return norms([jax.tree.leaves(tree)], sharded=sharded, updated=updated)[0]


def norms(
    groups: Sequence[Sequence[jax.Array]], *, sharded: bool = False, updated: bool = False
) -> jax.Array:
    """The square roots of the sums of squares over each group of arrays, float32 `[groups]`.

    Arguments are as in `global_norm`.
    """
    if sharded:
        squares = (sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in g) for g in groups)
        return jnp.sqrt(jnp.stack(list(squares)))
    sums = _partial_squares([x for group in groups for x in group], stack=not updated)
    rows = [jnp.concatenate([sums.pop(0) for _ in group]) for group in groups]
    length = max(row.size for row in rows)
    squares = jnp.stack([jnp.pad(row, (0, length - row.size)) for row in rows])
    # Without the barrier XLA sums each part by itself.
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(squares), axis=1))


def _partial_squares(arrays: Sequence[jax.Array], *, stack: bool) -> list[jax.Array]:
    """The squares of each array in one dimension, float32; those of large ones partly summed."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, x in enumerate(arrays):
        alike[i if x.size <= _SMALL or not stack else (x.shape, x.dtype)].append(i)
    sums: dict[int, jax.Array] = {}
    for indices in alike.values():
        step = max(1, _STACKED // max(1, arrays[indices[0]].size))
        for start in range(0, len(indices), step):
            chosen = indices[start : start + step]
            x = jnp.stack([arrays[i] for i in chosen]).astype(jnp.float32)
            squares = jnp.sum(jnp.square(x), axis=_summed_axes(x.shape))
            sums |= {i: squares[j].reshape(-1) for j, i in enumerate(chosen)}
    return [sums[i] for i in range(len(arrays))]


def _summed_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last axes of arrays stacked along the first one: all that leave enough sums of each."""
    if math.prod(shape[1:]) <= _SMALL:
        return ()
    kept = 2
    while kept < len(shape) - 1 and math.prod(shape[1:kept]) < _MIN_SUMS:
        kept += 1
    return tuple(range(kept, len(shape)))


def clip_by_global_norm(max_norm: float, *, sharded: bool = False) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, with the `global_norm` of this module."""

    def clip(updates: Any, params: Any) -> Any:
        del params
        norm = global_norm(updates, sharded=sharded)

        def scale(x: jax.Array) -> jax.Array:
            return jnp.where(norm < max_norm, x, (x / norm.astype(x.dtype)) * max_norm)

        return jax.tree.map(scale, updates)

    return optax.stateless(clip)
