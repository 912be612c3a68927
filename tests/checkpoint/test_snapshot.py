# SPDX-License-Identifier: Apache-2.0
"""Copies of the state that are written while it changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.checkpoint import snapshot
from vit_jax.checkpoint.snapshot import Snapshot


@pytest.fixture
def state():
    devices = jax.devices()
    mesh = Mesh(np.array(devices[:2]), "data")
    place = functools.partial(NamedSharding, mesh)
    return {
        "whole": jax.device_put(jnp.arange(64.0), place(PartitionSpec())),
        "cut": jax.device_put(jnp.arange(128.0), place(PartitionSpec("data"))),
        "step": jax.device_put(jnp.int32(7), devices[0]),
    }


@functools.partial(jax.jit, donate_argnums=0)
def add_one(x):
    return x + 1


def addresses(tree):
    shards = [s.data for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return [shard.unsafe_buffer_pointer() for shard in shards]


def test_a_copy_stays_what_it_was_when_the_state_is_donated(state):
    copy = Snapshot().take(state)
    before = jax.device_get(copy)
    state = jax.tree.map(add_one, state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(copy), before)
    np.testing.assert_array_equal(copy["cut"], np.arange(128.0))
    np.testing.assert_array_equal(copy["whole"], np.arange(64.0))
    assert copy["step"] == 7
    assert state["step"] == 8


def test_later_copies_take_the_memory_of_the_first_and_no_other(state):
    snapshots = Snapshot()
    first = addresses(snapshots.take(state))
    for i in range(3):
        state = jax.tree.map(add_one, state)
        copy = snapshots.take(state)
        assert addresses(copy) == first
        assert copy["step"] == 8 + i
    assert not set(first) & set(addresses(state))


def test_what_is_on_all_devices_is_copied_once(state):
    copy = Snapshot().take(state)
    assert [len(copy[k].addressable_shards) for k in ("whole", "cut")] == [1, 2]


def test_the_state_of_an_accelerator_is_not_copied_there(state, monkeypatch):
    monkeypatch.setattr(snapshot, "_platform", lambda x: "gpu")
    assert Snapshot().take(state) is None
