# SPDX-License-Identifier: Apache-2.0
"""A recorded trace says which operations took the time."""

import jax
import jax.numpy as jnp
import pytest

from vit_jax.observe.trace import Operation, describe_operations, read_operations


@pytest.fixture(scope="module")
def operations(tmp_path_factory):
    """Of two calls of a program whose loop makes three products."""

    @jax.jit
    def multiply(x):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ x), None), x, length=3)[0]

    x = jax.block_until_ready(multiply(jnp.eye(256)))
    folder = tmp_path_factory.mktemp("trace")
    with jax.profiler.trace(str(folder)):
        for _ in range(2):
            x = jax.block_until_ready(multiply(x))
    return read_operations(folder)


def find(operations, word):
    return next(o for o in operations if word in o.name)


def test_a_loop_has_its_own_time_only(operations):
    loop, tanh = find(operations, "while"), find(operations, "tanh")
    assert loop.calls == 2
    assert tanh.calls == 2 * 3
    assert 0 < loop.seconds < sum(o.seconds for o in operations) / 2


def test_shares_are_of_all_and_the_longest_comes_first(operations):
    assert sum(o.share for o in operations) == pytest.approx(1)
    seconds = [o.seconds for o in operations]
    assert seconds == sorted(seconds, reverse=True)
    assert min(seconds) >= 0


def test_lines_are_of_a_step_on_a_device():
    found = [Operation("dot", 0.6, 0.75, 24), Operation("tanh", 0.2, 0.25, 4)]
    lines = describe_operations(found, steps=2, devices=2, count=1)
    assert [line.split() for line in lines] == [["75.0%", "150.000", "ms", "6", "x", "dot"]]


def test_a_folder_without_a_trace_has_no_operations(tmp_path):
    assert read_operations(tmp_path) == []
