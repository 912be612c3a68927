# SPDX-License-Identifier: Apache-2.0
"""Finds pairs of similar rows among features, in memory that does not grow with their square."""

import dataclasses

import numpy as np

from vit_jax.observe.progress_log import ProgressLog

# Most values of an example that are compared; longer ones are sketched.
WIDTH = 1024
# Rows of a block: a product of two blocks takes 16 MiB.
_BLOCK = 2048


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of similar rows.

    Attributes:
      first: the row that comes first, int64 `[found]`.
      second: the other one, int64 `[found]`.
      cosine: of each pair, float32 `[found]`, in descending order.
      total: number of pairs above the threshold; more than `found` if some were left out.
    """

    first: np.ndarray
    second: np.ndarray
    cosine: np.ndarray
    total: int


def sketch(rows: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """Shortens rows such that their distances stay about the same.

    Values with random signs are added up in `width` groups (a count sketch, Charikar et al. 2002):
    squared distances are kept on average, with a relative deviation of sqrt(2 / width).

    Args:
      rows: float32 `[n, ...]`.
      width: of the result, float32 `[n, width]`; shorter rows stay as they are.
    """
    rows = rows.reshape(len(rows), -1)
    length = rows.shape[1]
    if length <= width:
        return rows
    rng = np.random.default_rng(0)
    order, signs = rng.permutation(length), rng.choice(np.array([-1, 1], np.float32), length)
    shuffled = (rows * signs)[:, order]
    shuffled = np.pad(shuffled, ((0, 0), (0, -length % width)))
    return shuffled.reshape(len(rows), -1, width).sum(axis=1)


def center(rows: np.ndarray) -> np.ndarray:
    """Subtracts the mean of rows, float32 `[n, width]`, and scales each to the length 1.

    Rows that equal the mean become zeros, which are similar to nothing.
    """
    rows = rows - rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(lengths, 1e-12)


def find_pairs(rows: np.ndarray, threshold: float, *, limit: int) -> Pairs:
    """Finds pairs of rows whose product is at least `threshold`; logs progress.

    Args:
      rows: unit vectors, float32 `[n, width]`.
      threshold: least cosine.
      limit: most pairs that are kept, those with the largest cosines.
    """
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    total, stored = 0, 0
    with ProgressLog("comparing", total=len(rows), unit="images") as progress:
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            for other in range(start, len(rows), _BLOCK):
                products = block @ rows[other : other + _BLOCK].T
                if other == start:  # Each pair once, and no row with itself.
                    products[np.tril_indices(len(block))] = -np.inf
                first, second = np.nonzero(products >= threshold)
                total += len(first)
                stored += len(first)
                kept.append((first + start, second + other, products[first, second]))
                if stored > 2 * limit:
                    kept = [_take_largest(kept, limit)]
                    stored = limit
            progress.advance(len(block))
    first, second, cosine = _take_largest(kept, limit)
    return Pairs(first, second, cosine, total)


def _take_largest(
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]], limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second, cosine = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    order = np.argsort(-cosine, kind="stable")[:limit]
    return first[order], second[order], cosine[order]
