# SPDX-License-Identifier: Apache-2.0
"""Which record stands at each position of the endless training stream, and its random numbers.

Both are functions of (seed, position), so that they are the same whoever asks, in whatever order.
The permutations are Grain's.
"""

import itertools
import threading
from typing import Protocol

import numpy as np
from grain.experimental import index_shuffle

from vit_jax.data.mixture import Mixture, Schedule

# Which of the streams of numbers that are derived from one seed.
_SHUFFLE, _RNGS = 1, 3


class Order(Protocol):
    """Indices of records by position."""

    def __getitem__(self, position: int) -> int: ...


def _derive(*seeds: int) -> int:
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


class Shuffled:
    """All of `range(start, stop)` in each epoch, shuffled anew."""

    def __init__(self, start: int, stop: int, *, seed: int):
        self._start, self._length, self._seed = start, stop - start, seed

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        seed = (self._seed + epoch) % 2**32
        return self._start + index_shuffle(place, max_index=self._length - 1, seed=seed, rounds=4)


class Mixed:
    """Indices into a mixture; each source is shuffled anew in each of its own epochs."""

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
    """Each batch holds the next batch_size / repeats of an order, `repeats` times.

    Copies lie a whole round apart: mixing with the neighbour mixes different images. Where the
    division leaves a rest, some stand in the batch once less.
    """

    def __init__(self, order: Order, batch_size: int, repeats: int):
        self._order, self._batch_size = order, batch_size
        self._distinct = -(-batch_size // repeats)

    def __getitem__(self, position: int) -> int:
        step, row = divmod(position, self._batch_size)
        return self._order[step * self._distinct + row % self._distinct]


def shuffled(length: int, *, seed: int) -> Shuffled:
    """All of `length` records in each epoch, by the seed of a run."""
    return Shuffled(0, length, seed=_derive(seed, _SHUFFLE))


class PositionRng(threading.local):
    """The generator of random numbers of each position; a thread's next call ends the last one."""

    def __init__(self, seed: int):
        self._generator = np.random.Generator(np.random.Philox(_derive(seed, _RNGS)))
        self._state = self._generator.bit_generator.state

    def __call__(self, position: int) -> np.random.Generator:
        # Much faster than a generator for each.
        self._state["state"]["counter"][3] = position
        self._generator.bit_generator.state = self._state
        return self._generator
