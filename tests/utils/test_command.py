# SPDX-License-Identifier: Apache-2.0
"""How commands begin and end."""

import subprocess
import sys

import pytest

from vit_jax.utils.command import run_command
from vit_jax.utils.errors import UserError


def run(main, monkeypatch, *arguments, **options):
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as end:
        run_command(main, **options)
    return end.value.code


def raiser(error):
    def main(argv):
        raise error

    return main


def test_a_command_gets_its_arguments_and_gives_its_code(monkeypatch):
    assert run(lambda argv: len(argv), monkeypatch, "a", "b", "c") == 3
    assert not run(lambda argv: None, monkeypatch)


def test_bad_input_and_an_interruption_are_one_line(monkeypatch, capsys):
    assert run(raiser(UserError("two\nlines")), monkeypatch) == 2
    assert run(raiser(KeyboardInterrupt()), monkeypatch) == 130
    assert run(raiser(KeyboardInterrupt()), monkeypatch, interrupted="goes on") == 130
    assert capsys.readouterr().err.splitlines() == [
        "vit_jax: error: two lines",
        "vit_jax: interrupted",
        "vit_jax: goes on",
    ]


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 // 0)


def test_a_reader_that_has_seen_enough_ends_a_command_in_silence():
    program = (
        "from vit_jax.utils.command import run_command\n"
        "run_command(lambda argv: [print('line ' * 50) for _ in range(5000)] and 0)\n"
    )
    shell = '"$0" -c "$1" | head -1; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, program], capture_output=True, text=True, timeout=600
    )
    assert (done.stdout.splitlines()[1], done.stderr) == ("1", "")
