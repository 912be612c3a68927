# SPDX-License-Identifier: Apache-2.0
"""Ranks of matching vectors among all others, counted on the mesh in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.evaluators.features import put, shard_rows
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.parallel.mesh import count_batch_shards
from vit_jax.runtime.preemption import interruptible

# Number of similarities that are in memory at a time.
_MAX_SIMILARITIES = 2**26


def rank_matches(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    *,
    mesh: Mesh,
    name: str,
) -> np.ndarray:
    """For each query, the number of others in the gallery before its first match.

    The gallery is in the order of products with the query, the largest first; equal ones are in
    their own order. A match has the id of the query; where there are several, the best counts.

    Args:
      queries: float32 `[n, width]`; their rows are sharded over the mesh.
      gallery: float32 `[m, width]`, with a match for each query.
      query_ids: int32 `[n]`, at least 0.
      gallery_ids: int32 `[m]`.
      mesh: the mesh to compute on.
      name: of the evaluator, for the log.

    Returns:
      int32 `[n]`; 0 for a match that is the best.

    Raises:
      Preempted: the job was asked to stop.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    shards = count_batch_shards(mesh)
    size = min(len(queries), max(_MAX_SIMILARITIES // len(gallery), shards))
    size += -size % shards
    fixed = (put(gallery, everywhere), put(gallery_ids, everywhere))
    count = jax.jit(_count_before, out_shardings=everywhere)
    ranks = []
    with ProgressLog(f"{name}: ranks", total=len(queries), unit="queries") as progress:
        for start in interruptible(range(0, len(queries), size)):
            block = slice(start, start + size)
            ids = query_ids[block]
            rows = (shard_rows(x, mesh, size=size) for x in (queries[block], ids))
            ranks.append(np.asarray(count(*rows, *fixed))[: len(ids)])
            progress.advance(len(ids))
    return np.concatenate(ranks)


def _count_before(
    queries: jax.Array, query_ids: jax.Array, gallery: jax.Array, gallery_ids: jax.Array
) -> jax.Array:
    # Accelerators would round the factors by default.
    products = jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)
    matches = query_ids[:, None] == gallery_ids
    of_matches = jnp.where(matches, products, -jnp.inf)
    best, first = of_matches.max(axis=1, keepdims=True), of_matches.argmax(axis=1)[:, None]
    # What is behind is found, so that NaN comes before everything.
    behind = (products < best) | ((products == best) & (jnp.arange(len(gallery)) > first))
    return jnp.sum(~behind & ~matches, axis=1)


def recalls(ranks: np.ndarray, at: tuple[int, ...]) -> dict[int, float]:
    """The shares of queries with a match among the first k, for each k, from `rank_matches`."""
    return {k: float(np.mean(ranks < k)) for k in at}
