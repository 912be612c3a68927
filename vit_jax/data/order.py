# SPDX-License-Identifier: Apache-2.0
"""The record at each position of the endless training stream, and its random numbers.

Both are functions of (seed, position), so they depend on neither host nor order of calls. The
permutations are Grain's.
"""

import itertools
import threading
from typing import Protocol

import numpy as np
from grain.experimental import index_shuffle

from vit_jax.data.mixture import Mixture, Schedule

# Streams of random numbers that are derived from one seed.
_SHUFFLE, _RNGS, CAPTIONS, BUDGETS, ROWS = 1, 3, 4, 5, 6


class Order(Protocol):
    """Indices of records by position."""

    def __getitem__(self, position: int) -> int: ...


def _derive(*seeds: int) -> int:
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


class Shuffled:
    """All of `range(start, stop)` in each epoch, in another order each time."""

    def __init__(self, start: int, stop: int, *, seed: int):
        self._start, self._length, self._seed = start, stop - start, seed

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        seed = (self._seed + epoch) % 2**32
        return self._start + index_shuffle(place, max_index=self._length - 1, seed=seed, rounds=4)


class Mixed:
    """Indices into a mixture; each source is reshuffled in each of its own epochs."""

    def __init__(self, mixture: Mixture, schedule: Schedule, *, seed: int):
        self._schedule = schedule
        self._orders = [
            Shuffled(*limits, seed=_derive(seed, k))
            for k, limits in enumerate(itertools.pairwise(mixture.starts))
        ]

    def __getitem__(self, position: int) -> int:
        k, turn = self._schedule[position]
        return self._orders[k][turn]


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


def shuffled(length: int, *, seed: int) -> Shuffled:
    """All of `length` records in each epoch, shuffled by the seed of a run."""
    return Shuffled(0, length, seed=_derive(seed, _SHUFFLE))


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
