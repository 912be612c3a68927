# SPDX-License-Identifier: Apache-2.0
"""Where the time went, over restarts, kills and torn lines."""

import pytest

from vit_jax import status
from vit_jax.checkpoint.workdir import find_holder, lock_workdir
from vit_jax.observe import ledger
from vit_jax.observe.ledger import Ledger, read_ledger, summarize
from vit_jax.training import phases
from vit_jax.training.phases import Phases
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import LEDGER


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    time = monotonic

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (ledger, phases):
        monkeypatch.setattr(module, "time", clock)
    return clock


def work(workdir, clock, *, start, stop, end=None, active=True):
    """A start of 10 s, then a step each second, of which half is a wait for data."""
    during = Phases()
    run = Ledger(workdir, step=start, total_steps=100, seconds=during.seconds, active=active)
    clock.pass_(10)
    for step in range(start + 1, stop + 1):
        during.step_taken()
        run.took(step)
        with during("data_wait"):
            clock.pass_(0.5)
        clock.pass_(0.5)
    with during("save"):
        clock.pass_(2)
    run.write_progress(saved=stop)
    if end:
        run.end(end)
        run.end("error: a later one")


def test_time_is_counted_by_what_it_was_spent_on(tmp_path, clock):
    work(tmp_path, clock, start=0, stop=10, end="finished")
    found = summarize(read_ledger(tmp_path))
    assert found is not None
    assert found.seconds == pytest.approx(
        {"step": 5, "compile": 10, "data_wait": 5, "save": 2, "evaluation": 0}
        | {"repeated": 0, "down": 0}
    )
    assert (found.step, found.saved, found.causes) == (10, 10, ("finished",))
    assert found.goodput == pytest.approx(5 / 22)
    assert found.steps_per_second == pytest.approx(1.0)


def test_a_killed_start_leaves_lost_steps_and_time(tmp_path, clock):
    work(tmp_path, clock, start=0, stop=20)
    with open(tmp_path / LEDGER, "a") as file:
        file.write('{"event": "prog')
    clock.pass_(100)
    work(tmp_path, clock, start=15, stop=30, end="SIGTERM")
    found = summarize(read_ledger(tmp_path))
    assert found is not None
    assert (found.starts, found.causes, found.lost) == (2, ("killed", "SIGTERM"), 5)
    assert found.seconds["down"] == pytest.approx(100)
    assert found.seconds["repeated"] == pytest.approx(5)
    assert found.seconds["step"] == pytest.approx(10 + 7.5 - 5)


def test_steps_that_were_rolled_back_are_lost(tmp_path, clock):
    during = Phases()
    run = Ledger(tmp_path, step=0, total_steps=100, seconds=during.seconds, active=True)
    for step in range(1, 11):
        during.step_taken()
        run.took(step)
        clock.pass_(1)
    run.write_rollback(to=4, past=10)
    run.end("finished")
    found = summarize(read_ledger(tmp_path))
    assert found is not None
    assert found.lost == 6


def test_only_one_process_writes(tmp_path, clock):
    work(tmp_path, clock, start=0, stop=10, end="finished", active=False)
    assert list(tmp_path.iterdir()) == []


def test_the_status_says_what_the_ledger_has(tmp_path, clock, capsys):
    work(tmp_path, clock, start=0, stop=20)
    work(tmp_path, clock, start=15, stop=30)
    with lock_workdir(tmp_path):
        assert find_holder(tmp_path) is not None
        found = status.describe(tmp_path)
    assert found["running"].startswith("process ")
    assert found["eta_s"] == pytest.approx(70)
    assert found["causes"] == ["killed"]
    assert find_holder(tmp_path) is None
    found = status.describe(tmp_path)
    assert (found["running"], found["causes"]) == (None, ["killed", "killed"])
    lines = "\n".join(status.show(tmp_path, found))
    for words in ("step 30 of 100", "1 steps/s", "ends: killed 2", "5 steps were taken again"):
        assert words in lines
    status.main([str(tmp_path), "--json"])
    assert '"steps_lost": 5' in capsys.readouterr().out


def test_a_folder_without_a_ledger_has_no_status(tmp_path):
    with pytest.raises(UserError, match=r"has no ledger\.jsonl"):
        status.describe(tmp_path)
