# SPDX-License-Identifier: Apache-2.0
"""The record at each position of the endless training stream, and its random numbers.

Both are functions of (seed, position), so they depend on neither host nor order of calls. The
permutations of all records are Grain's.
"""

import bisect
import functools
import threading
from typing import Protocol

import numpy as np
from grain.experimental import index_shuffle

from vit_jax.data.mixture import Mixture, Schedule
from vit_jax.data.sources.base import Shards, Source

# Streams of random numbers that are derived from one seed.
_SHUFFLE, _RNGS, CAPTIONS, BUDGETS, ROWS = 1, 3, 4, 5, 6


class Order(Protocol):
    """Indices of records by position."""

    def __getitem__(self, position: int) -> int: ...


def _derive(*seeds: int) -> int:
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


def _permute(length: int, seed: int) -> np.ndarray:
    """A permutation of `range(length)`, uint32, by a stream that numpy keeps as it is."""
    return np.argsort(np.random.Philox(seed).random_raw(length), kind="stable").astype(np.uint32)


class Shuffled:
    """All of `range(length)` in each epoch, in another order each time."""

    def __init__(self, length: int, *, seed: int):
        self._length, self._seed = length, seed

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        seed = (self._seed + epoch) % 2**32
        return index_shuffle(place, max_index=self._length - 1, seed=seed, rounds=4)


class WindowShuffled:
    """All records in each epoch: shards in another order each time, shuffled within windows.

    The shards of an epoch, one after the other, are a sequence of records, which is cut into
    windows. Each window is shuffled, so a record is less than `window` positions from its place in
    the sequence.
    """

    def __init__(self, shards: Shards, *, window: int, seed: int):
        self._shards, self._window, self._seed = shards, window, seed
        self._length = int(shards.bounds[-1])
        # A few windows and epochs are in use at a time.
        self._arranged = functools.lru_cache(maxsize=4)(self._arrange)
        self._permuted = functools.lru_cache(maxsize=8)(self._permute)

    def _arrange(self, epoch: int) -> tuple[list[int], list[int]]:
        """The shards of an epoch in their order, and the place of the first record of each."""
        lengths = np.diff(self._shards.bounds)
        order = _permute(len(lengths), _derive(self._seed, 0, epoch))
        return order.tolist(), np.cumsum(np.append(0, lengths[order])).tolist()

    def _permute(self, epoch: int, first: int) -> np.ndarray:
        """The order of the window of an epoch that starts at a place, `[records]`."""
        length = min(self._window, self._length - first)
        return _permute(length, _derive(self._seed, 1, epoch, first))

    def window(self, position: int) -> range:
        """The positions of the window that a position is in."""
        epoch, place = divmod(position, self._length)
        first = epoch * self._length
        start = place - place % self._window
        return range(first + start, first + min(start + self._window, self._length))

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        within = place % self._window
        first = place - within
        place = first + int(self._permuted(epoch, first)[within])
        order, starts = self._arranged(epoch)
        k = bisect.bisect_right(starts, place) - 1
        stored = self._shards.bounds[order[k]] + place - starts[k]
        return int(stored if self._shards.order is None else self._shards.order[stored])


class Mixed:
    """Indices into a mixture; each source is reshuffled in each of its own epochs."""

    def __init__(self, mixture: Mixture, schedule: Schedule, *, seed: int, window: int = 0):
        self._schedule, self._starts = schedule, mixture.starts
        self._orders = [
            _shuffle(source, window, seed=_derive(seed, k))
            for k, source in enumerate(mixture.sources)
        ]

    def __getitem__(self, position: int) -> int:
        k, turn = self._schedule[position]
        return self._starts[k] + self._orders[k][turn]


class RepeatedAugmentation:
    """Each batch holds the next batch_size / repeats examples of an order, `repeats` times.

    Copies are batch_size / repeats rows apart, so that mixing a row with its neighbour mixes
    different images. If the division has a remainder, some examples have one copy less.
    """

    def __init__(self, order: Order, batch_size: int, repeats: int):
        self._order, self._batch_size = order, batch_size
        self._distinct = -(-batch_size // repeats)

    def __getitem__(self, position: int) -> int:
        step, row = divmod(position, self._batch_size)
        return self._order[step * self._distinct + row % self._distinct]


def shuffled(source: Source, *, seed: int, window: int = 0) -> Order:
    """All records of a source in each epoch, shuffled by the seed of a run.

    With a `window`, shards are shuffled, and records within windows; see `WindowShuffled`. Raises
    `ValueError` if the source is not stored in shards.
    """
    return _shuffle(source, window, seed=_derive(seed, _SHUFFLE))


def _shuffle(source: Source, window: int, *, seed: int) -> Order:
    if not window:
        return Shuffled(len(source), seed=seed)
    if (shards := source.shards()) is None:
        raise ValueError(f"{source.describe(0)} is not stored in shards")
    return WindowShuffled(shards, window=window, seed=seed)


class PositionRng(threading.local):
    """The random number generator of each position, valid until the thread's next call.

    `stream` is that of the operations on the image, or one of the others.
    """

    def __init__(self, seed: int, *, stream: int = _RNGS):
        self._generator = np.random.Generator(np.random.Philox(_derive(seed, stream)))
        self._state = self._generator.bit_generator.state

    def __call__(self, position: int) -> np.random.Generator:
        # Setting the state is much faster than making a generator for each position.
        self._state["state"]["counter"][3] = position
        self._generator.bit_generator.state = self._state
        return self._generator
