# SPDX-License-Identifier: Apache-2.0
"""The clock of the main thread."""

import types

import pytest

from vit_jax.training import phases as lib
from vit_jax.training.phases import Phases


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(lib, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def spent(phases):
    return {phase: seconds for phase, seconds in phases.seconds().items() if seconds}


def test_each_second_counts_once_for_the_innermost_phase(clock):
    phases = Phases()
    clock.now += 8
    with phases("data_wait"):
        clock.now += 1
    phases.step_taken()
    clock.now += 2
    with phases("evaluation"):
        clock.now += 4
        with phases("save"):
            clock.now += 16
        assert spent(phases) == {
            "compile": 8,
            "data_wait": 1,
            "step": 2,
            "evaluation": 4,
            "save": 16,
        }
    clock.now += 32
    assert spent(phases)["step"] == 34


def test_a_phase_ends_with_its_block_when_that_fails(clock):
    phases = Phases()
    with pytest.raises(ValueError, match="full"), phases("save"):
        raise ValueError("full")
    clock.now += 1
    assert spent(phases) == {"compile": 1}


def test_what_is_watched_is_a_whole_step_and_each_other_phase(clock):
    phases = Phases()
    clock.now += 5
    assert phases.watched() == ("compile", 100.0)
    phases.step_taken()
    with phases("data_wait"):
        clock.now += 5
        assert phases.watched() == ("step", 105.0)
    assert phases.watched() == ("step", 105.0)
    with phases("save"):
        assert phases.watched() == ("save", 110.0)
        clock.now += 1
    assert phases.watched() == ("step", 111.0)
