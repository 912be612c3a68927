# SPDX-License-Identifier: Apache-2.0
"""Batches filled in the background: order, bounds, errors, and how it ends."""

import gc
import itertools
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from vit_jax.data.loader import RUN, Loader, count_ahead, count_threads

ROOT = Path(__file__).parent.parent.parent


def fill(batch, step, start, stop):
    batch[start:stop] = step * 1000 + np.arange(start, stop)


def load(steps, *, fill=fill, rows=3 * RUN + 5, num_threads=3, ahead=3, make=None):
    make = make or (lambda step: np.zeros(rows, np.int64))
    return Loader(steps, make=make, fill=fill, rows=rows, num_threads=num_threads, ahead=ahead)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("input")]


@pytest.mark.parametrize("rows", [1, RUN, 3 * RUN + 5])
@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_batches_come_whole_and_in_order_whoever_is_slow(rows, num_threads):
    def fill_slowly(batch, step, start, stop):
        time.sleep(0.004 if (step + start) % 3 == 0 else 0)
        fill(batch, step, start, stop)

    batches = list(load(range(5, 15), fill=fill_slowly, rows=rows, num_threads=num_threads))
    assert [b.tolist() for b in batches] == [
        list(range(s * 1000, s * 1000 + rows)) for s in range(5, 15)
    ]
    assert threads() == []


def test_without_threads_a_batch_is_filled_when_it_is_asked_for():
    filled = []

    def note(batch, step, start, stop):
        filled.append((step, start, stop, threading.current_thread()))

    batches = load(range(2), fill=note, rows=3 * RUN, num_threads=0)
    for step in range(2):
        assert len(filled) == step
        next(batches)
    assert filled == [(step, 0, 3 * RUN, threading.current_thread()) for step in range(2)]
    batches.close()
    assert list(batches) == []


def test_no_more_batches_are_alive_than_were_asked_for():
    alive, most = weakref.WeakSet(), 0

    class Buffer(np.ndarray):
        __hash__ = object.__hash__

    def make(step):
        nonlocal most
        buffer = np.zeros(2 * RUN, np.int64).view(Buffer)
        alive.add(buffer)
        gc.collect(0)
        most = max(most, len(alive))
        return buffer

    for batch in load(range(30), rows=2 * RUN, ahead=4, make=make):
        time.sleep(0.001)
        del batch
    assert most == 4


def test_the_first_error_by_row_is_raised_and_the_threads_end():
    def fail(batch, step, start, stop):
        if step == 2 and start >= RUN:
            time.sleep(0.02 if start == RUN else 0)  # the later row fails first
            raise ValueError(f"row {start}")

    batches = load(itertools.count(), fill=fail)
    next(batches), next(batches)
    with pytest.raises(ValueError, match=f"row {RUN}$"):
        next(batches)
    assert threads() == []
    assert list(batches) == []


@pytest.mark.parametrize("end", ["close", "drop", "raise"])
def test_threads_end_with_the_loader(end):
    batches = load(itertools.count())
    assert threads() == []  # nothing starts before it is asked for
    next(batches)
    assert 1 <= len(threads()) <= 3
    if end == "close":
        batches.close()
        assert list(batches) == []
    elif end == "raise":

        def consume(batches):
            for _ in batches:
                raise KeyError

        with pytest.raises(KeyError):
            consume(batches)
        del batches
    else:
        del batches
    assert threads() == []


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_program_ends_at_once_and_silently_while_batches_are_loaded(end):
    program = (
        "import itertools, time\n"
        "from vit_jax.data.loader import Loader\n"
        "def fill(batch, step, start, stop):\n"
        "    time.sleep(0.5 if step else 0)\n"
        "batches = Loader(itertools.count(), make=lambda step: [], fill=fill, rows=64_000,\n"
        "                 num_threads=2, ahead=2)\n"
        "next(batches)\n"  # 2,000 runs are waiting: 500 seconds
        "print('loaded', flush=True)\n" + end
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert time.monotonic() - start < 400
    assert done.stdout == "loaded\n"
    if end == "1 / 0":
        assert done.stderr.count("Traceback") == 1
    else:
        assert done.stderr == ""
    assert done.returncode == {"": 0, "raise SystemExit(3)": 3, "1 / 0": 1}[end]


def test_a_thread_that_never_ends_is_left_behind(monkeypatch):
    monkeypatch.setattr("vit_jax.data.loader._PATIENCE_S", 0.2)
    never = threading.Event()
    batches = load(itertools.count(), fill=lambda batch, step, *run: step and never.wait())
    next(batches)
    begun = time.monotonic()
    batches.close()
    assert time.monotonic() - begun >= 0.2
    never.set()


def test_threads_are_those_given_or_one_for_each_core():
    assert count_threads(5) == 5
    assert count_threads(None) >= 1


def test_all_threads_find_work_ahead():
    for rows, num_threads in itertools.product((1, 16, 128, 4096), (1, 2, 96)):
        runs = -(-rows // RUN)
        assert (count_ahead(rows, num_threads) - 2) * runs >= 2 * num_threads
    assert count_ahead(4096, 16) == 3
    assert count_ahead(4096, 0) == 1
