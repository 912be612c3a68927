# SPDX-License-Identifier: Apache-2.0
"""Copies the train state, so that it can be written while training on a CPU continues."""

from typing import Any

import jax
import jax.numpy as jnp


class Snapshot:
    """Copies a state into buffers that it reuses, since allocating them takes longer than the copy.

    An accelerator needs no copy: its state is written from a copy on the host.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def take(self, state: Any) -> Any:
        """Starts to copy a tree of arrays, which may be donated afterwards.

        Args:
          state: a tree of arrays, with the same shapes, dtypes and shardings in each call.

        Returns:
          A tree that is valid until the next call, with one copy of each replicated array; None
          unless all devices are CPUs of a single process.
        """
        leaves, structure = jax.tree.flatten(state)
        if jax.process_count() > 1 or any(_platform(x) != "cpu" for x in leaves):
            return None
        leaves = [x.addressable_data(0) if x.is_fully_replicated else x for x in leaves]
        # A compiled program runs on one set of devices.
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


# The old copies are donated, so that the new ones reuse their memory.
_copy = jax.jit(_copy_arrays, donate_argnums=0, keep_unused=True)
