# SPDX-License-Identifier: Apache-2.0
"""Commands in children of a server: how they end, and what reaches them."""

import os
import signal
from multiprocessing import forkserver

import pytest

from vit_jax.runtime.children import run_child, start_server


@pytest.mark.parametrize(
    ("how", "code", "expected"),
    [("exit", 0, 0), ("exit", 75, 75), ("crash", 3, 3), ("kill", 0, -9), ("raise", 0, 1)],
)
def test_the_exit_code_of_a_child_harms_no_other(how, code, expected):
    assert run_child("tests.ending", [how, str(code)]) == (expected, None)
    assert run_child("tests.ending", ["exit", "0"]) == (0, None)


def test_the_handlers_of_signals_are_as_they_were():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    run_child("tests.ending", ["exit", "0"])
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_signals_to_the_whole_group_do_not_end_the_server():
    start_server(())
    server = forkserver._forkserver._forkserver_pid  # pyright: ignore[reportAttributeAccessIssue]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(server, number)
    assert run_child("tests.ending", ["exit", "4"]) == (4, None)
    assert server == forkserver._forkserver._forkserver_pid  # pyright: ignore[reportAttributeAccessIssue]
