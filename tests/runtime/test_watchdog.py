# SPDX-License-Identifier: Apache-2.0
"""A process that hangs says where, and ends with the code that asks for another run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.clock import Clock, wait_until
from vit_jax.runtime import watchdog
from vit_jax.runtime.watchdog import Limits, Watchdog
from vit_jax.training.phases import Phases
from vit_jax.utils.errors import UserError
from vit_jax.utils.signals import RUN_AGAIN

ROOT = Path(__file__).parent.parent.parent

HANGS = """
import sys, time
from pathlib import Path
from vit_jax.runtime.watchdog import Limits, Watchdog
from vit_jax.training.phases import Phases

def hang_here():
    time.sleep(600)

limits = Limits(step=600, save=0.2)
words = lambda phase: print("words", phase)
phases = Phases()
with Watchdog(limits, phases.watched, workdir=Path(sys.argv[1]), process=3, on_exit=words):
    phases.step_taken()
    with phases("save"):
        hang_here()
"""


def test_it_names_process_phase_and_place_and_asks_for_another_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-u", "-c", HANGS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == RUN_AGAIN, done.stderr
    assert done.stdout == "words save\n"
    for text in (done.stderr, (tmp_path / "watchdog-3.txt").read_text()):
        for words in ("process 3 hangs", "phase 'save'", "watchdog.save=0.2", "in hang_here"):
            assert words in text


@pytest.fixture
def ends(monkeypatch):
    """The codes with which the process would have ended."""
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
    return codes


def test_what_goes_on_is_left_alone(tmp_path, ends, monkeypatch):
    clock, looks = Clock(), []
    monkeypatch.setattr("vit_jax.runtime.watchdog.time", clock)
    monkeypatch.setattr("vit_jax.training.phases.time", clock)
    limits, phases = Limits(step=0.05, evaluation=0), Phases()

    def watched():
        looks.append(phases.watched())
        return looks[-1]

    def take(seconds):
        clock.sleep(seconds)
        seen = len(looks)
        wait_until(lambda: len(looks) >= seen + 2)

    with Watchdog(limits, watched, workdir=tmp_path, process=0):
        for _ in range(4):
            phases.step_taken()
            take(0.04)
        with phases("evaluation"):  # 0 is no limit
            take(0.9)
        phases.step_taken()
        take(0.04)
        assert ends == []
        take(0.02)
        assert ends[0] == RUN_AGAIN


def test_the_limit_is_that_of_the_phase(tmp_path, ends, capsys):
    with Watchdog(Limits(compile=0.1), Phases().watched, workdir=tmp_path, process=0):
        wait_until(lambda: ends)
    assert ends[0] == RUN_AGAIN
    assert "in the phase 'compile'" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["compile", "step", "save", "evaluation"])
def test_negative_limits_are_refused(key):
    with pytest.raises(UserError, match=f"watchdog.{key}=-1: expected seconds"):
        Limits(**{key: -1})


def test_a_wait_for_data_counts_as_part_of_its_step(tmp_path, ends):
    phases = Phases()
    with Watchdog(Limits(step=0.3), phases.watched, workdir=tmp_path, process=0):
        phases.step_taken()
        while not ends:
            with phases("data_wait"):
                time.sleep(0.05)
    assert ends[0] == RUN_AGAIN
