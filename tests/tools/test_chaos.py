# SPDX-License-Identifier: Apache-2.0
"""Faults are injected and judged: one kill for real, and what the table makes of outcomes."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from tools.chaos import __main__ as chaos
from tools.chaos import faults
from tools.chaos.faults import Outcome
from tools.chaos.job import End, Lab
from vit_jax.utils.errors import UserError


def test_the_table_has_the_worst_of_each_fault():
    rows = chaos.tabulate(
        [
            Outcome("kill", "a", lost=2, equal=True),
            Outcome("kill", "b", lost=7, equal=False),
            Outcome("kill", "c", problem="it hangs", lost=0, equal=True),
            Outcome("twice", "d"),
        ]
    )
    assert chaos.show(rows).splitlines()[2:] == [
        "| kill | 3 | 1 | 7 | no |",
        "| twice | 1 | 1 | - | - |",
    ]


def test_a_fault_that_is_not_recovered_from_is_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(chaos, "prepare", lambda lab: None)
    ends = {"good": None, "bad": "the file was not named"}
    for name, problem in ends.items():
        fault = functools.partial(lambda problem, lab: iter([Outcome("x", "y", problem)]), problem)
        monkeypatch.setitem(chaos.FAULTS, name, fault)
    file = tmp_path / "found.json"
    assert chaos.main(["--only=good", f"--json={file}"]) == 0
    assert '"injected": 1' in file.read_text()
    assert chaos.main(["--only=good,bad"]) == 1
    assert "NOT RECOVERED the file was not named" in capsys.readouterr().out
    assert chaos.main(["--only=good", "--minutes=-1"]) == 1, "nothing was injected"
    with pytest.raises(UserError, match="--only=rain: expected some of kill, "):
        chaos.main(["--only=rain"])


def test_the_table_of_the_docs_is_that_of_the_results():
    root = Path(__file__).parent.parent.parent
    results = json.loads((root / "benchmarks" / "results" / "chaos.json").read_text())
    assert chaos.show(results["table"]) in (root / "docs" / "faults.md").read_text()


def test_one_bit_makes_another_end():
    params = {"kernel": np.ones(3, np.float32)}
    end = End(params, {1: 0.5})
    assert end.equals(End({"kernel": np.ones(3, np.float32)}, {1: 0.5}))
    assert not end.equals(End({"kernel": np.nextafter(params["kernel"], 2)}, {1: 0.5}))
    assert not end.equals(End(params, {1: 0.5, 2: 0.25}))


def test_growth_is_from_the_second_to_the_last_quarter():
    samples = [faults.Sample(step, 1000 - step, 5, 7, step) for step in range(0, 101, 10)]
    growth = faults.find_growth([*samples, faults.Sample(95, 2000, 9, 7, 95)])
    assert growth == {
        "memory": (970, 2000),
        "files": (5, 9),
        "threads": (7, 7),
        "written": (40, 100),
    }


def test_the_last_sample_need_not_be_the_one_of_the_highest_step():
    samples = [faults.Sample(step, 1, 1, 1, 1) for step in (10, 30, 90, 80)]
    assert set(faults.find_growth(samples).values()) == {(1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "sigterm", "nan"])
def test_runs_recover(kind, tmp_path):
    lab = Lab(tmp_path, np.random.default_rng(1))
    faults.prepare(lab)
    outcomes = list(faults.FAULTS[kind](lab))
    assert [o for o in outcomes if not chaos.is_recovered(o)] == []
    assert outcomes
