# SPDX-License-Identifier: Apache-2.0
"""Processes side by side: their output, the end of all when one fails, and another run."""

import sys
import time

import pytest

from vit_jax.launch import local


def command(text, *arguments):
    return [sys.executable, "-c", text, *arguments]


def test_lines_carry_the_number_of_the_process(capfd):
    code, told = local.run_once([command(f"print('line {i}')") for i in range(3)])
    assert (code, told) == (0, False)
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["[0] line 0", "[1] line 1", "[2] line 2"]


def test_all_end_when_one_fails():
    begun = time.monotonic()
    code, _ = local.run_once(
        [command("import time; time.sleep(600)"), command("raise SystemExit(3)")]
    )
    assert code == 3
    assert time.monotonic() - begun < 600


@pytest.mark.parametrize(
    ("end", "code", "runs"),
    [
        ("sys.exit(75)", 75, 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, 3),
        ("sys.exit(1)", 1, 1),
        ("pass", 0, 1),
    ],
)
def test_a_job_is_run_again_where_that_may_help(end, code, runs, monkeypatch, tmp_path, capfd):
    text = f"import os, pathlib, signal, sys; open(sys.argv[1], 'a').write('run '); {end}"
    ran = tmp_path / "ran"
    monkeypatch.setattr(local, "make_commands", lambda train, n, port: [command(text, str(ran))])
    assert local.main(["-n", "1", "--max_runs=3", "--", "x"]) == code
    assert ran.read_text() == "run " * runs
    said = f"launch: run 3 of 3, after exit code {code}"
    assert (said in capfd.readouterr().out) is (runs == 3)


def test_a_dry_run_prints_the_commands(capsys):
    assert local.main(["-n", "2", "--dry_run", "--", "--config=c.py", "--workdir=my runs"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("--num_processes=2 --process_id=0")
    assert "-m vit_jax.main --config=c.py '--workdir=my runs'" in second
