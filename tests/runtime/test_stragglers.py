# SPDX-License-Identifier: Apache-2.0
"""The process that the others wait for is named: once, and only if it costs something."""

import numpy as np
import pytest

from tests.clock import Clock
from tests.runtime.test_processes import CONFIG_FILE, run
from vit_jax.observe.ledger import read_ledger, summarize
from vit_jax.runtime import stragglers
from vit_jax.runtime.stragglers import PAUSE, Straggler, Stragglers, find_straggler
from vit_jax.training.phases import Phases


@pytest.mark.parametrize(
    ("waits", "named"),
    [
        ([0.0, 0.3], 1),
        ([0.5, 0.01], 0),
        ([0.1, 0.1, 0.5, 0.1], 2),
        ([0.01, 0.09], None),  # five times as long, of which nobody notices anything
        ([0.5, 0.6], None),  # the data is slow for all
        ([0.4, 0.55, 0.4], None),
        ([0.3, 0.46], 1),
        ([0.9], None),
        ([0.0, 0.0], None),
    ],
)
def test_a_process_is_named_if_it_is_clearly_slower(waits, named):
    found = find_straggler(waits)
    assert (None if found is None else found.process) == named


def test_the_share_of_the_others_is_their_median():
    assert find_straggler([0.0, 0.1, 0.2, 0.9]) == Straggler(3, 0.9, 0.1)


@pytest.fixture
def fake(monkeypatch):
    """The first of two processes, and what the second one waits."""
    other = [0.0]
    monkeypatch.setattr(stragglers.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        stragglers, "gather_over_processes", lambda share: np.array([[share], other])
    )
    clock = Clock()
    monkeypatch.setattr("vit_jax.training.phases.time", clock)
    phases = Phases()
    return Stragglers(phases.seconds), other, phases, clock


def test_waits_since_the_last_call_are_compared(fake):
    measured, other, phases, clock = fake
    with phases("data_wait"):
        clock.sleep(2)
    assert measured.compare() is None, "the first time has compilation in it"
    with phases("data_wait"):
        clock.sleep(0.75)
    clock.sleep(0.25)
    assert measured.compare() == Straggler(0, 0.75, 0.0)
    other[0] = 0.8
    found = measured.compare()
    assert found == Straggler(1, 0.8, 0.0), "the wait of process 0 is over"


def test_a_process_is_named_once_in_a_while(fake):
    measured, other, *_ = fake
    other[0] = 0.8
    named = [measured.compare() is not None for _ in range(2 * PAUSE + 1)]
    assert [i for i, is_named in enumerate(named) if is_named] == [0, PAUSE, 2 * PAUSE]


def test_a_process_alone_compares_nothing(monkeypatch):
    monkeypatch.setattr(stragglers, "gather_over_processes", lambda _: pytest.fail("it does"))
    assert Stragglers(Phases().seconds).compare() is None


# Process 1 reads as from a slow disk.
SLOW = """
import time
import jax
from vit_jax.data.sources.tfds import TfdsSource
read = TfdsSource.__getitem__
def slow(self, index):
    if jax.process_index():
        time.sleep(0.1)
    return read(self, index)
TfdsSource.__getitem__ = slow
"""


@pytest.mark.slow
def test_the_slow_one_of_two_processes_is_in_the_output_and_the_ledger(data_dir, tmp_path):
    text = SLOW + CONFIG_FILE.replace("total_steps=6", "total_steps=12").replace(
        "evals__val__every=3", "evals={}, data__num_threads=1"
    )
    (code, out, err), (other, *_) = run(tmp_path, data_dir, processes=2, devices=2, text=text)
    assert (code, other) == (0, 0), err
    (line,) = [line for line in out.splitlines() if "wait for process" in line]
    assert "the others wait for process 1 on " in line
    records = read_ledger(tmp_path / "workdir")
    (found,) = [r for r in records if r["event"] == "straggler"]
    assert found["process"] == 1
    assert found["wait"] > found["others"] + 0.1
    assert summarize(records).causes == ("finished",)
