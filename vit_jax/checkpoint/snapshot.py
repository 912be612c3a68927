# SPDX-License-Identifier: Apache-2.0
"""A copy of the train state that can be written while the steps go on, where the host computes."""

from typing import Any

import jax
import jax.numpy as jnp


class Snapshot:
    """Copies a state into memory that it keeps, as new memory takes longer than the copy.

    An accelerator needs none: its state is copied to the host, where that copy is written from.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def take(self, state: Any) -> Any:
        """Starts the copy of a tree of arrays, which may be donated afterwards.

        Args:
          state: of the same shapes and shardings each time.

        Returns:
          A tree that is whole until the next call; None where the devices are no CPUs of this
          process alone. Of an array that is whole on each device there is one copy.
        """
        leaves, structure = jax.tree.flatten(state)
        if jax.process_count() > 1 or any(_platform(x) != "cpu" for x in leaves):
            return None
        leaves = [x.addressable_data(0) if x.is_fully_replicated else x for x in leaves]
        # A program works on one set of devices.
        sets = [x.sharding.device_set for x in leaves]
        kept = self._kept or [None] * len(leaves)
        for devices in {frozenset(s) for s in sets}:
            where = [i for i, s in enumerate(sets) if s == devices]
            copies = _copy([kept[i] for i in where], [leaves[i] for i in where])
            for i, copy in zip(where, copies, strict=True):
                kept[i] = copy
        self._kept = kept
        return jax.tree.unflatten(structure, kept)


def _platform(x: jax.Array) -> str:
    return next(iter(x.sharding.device_set)).platform


def _copy_arrays(old: list[jax.Array | None], new: list[jax.Array]) -> list[jax.Array]:
    del old
    return [jnp.copy(x) for x in new]


# Into the memory of the old copies, which are handed over for that alone.
_copy = jax.jit(_copy_arrays, donate_argnums=0, keep_unused=True)
