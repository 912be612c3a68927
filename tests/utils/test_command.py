# SPDX-License-Identifier: Apache-2.0
"""How commands begin and end."""

import signal
import subprocess
import sys
import time

import pytest

from vit_jax.utils import signals
from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.streams import print_result


def run(main, monkeypatch, *arguments, **options):
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            run_command(main, **options)
    finally:
        signal.signal(signal.SIGINT, before)
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


def test_an_interruption_of_imports_ends_the_process_and_not_an_import(monkeypatch):
    ended, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signals, "end_now", lambda text, code: ended.append((text, code)))
    with signals.importing():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert ended == [("interrupted at the start, before anything was done", 130)]


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


def run_program(body, shell):
    """The exit code of a command whose `main` has a body, and what it writes, within a shell."""
    program = (
        "import hashlib, sys\n"
        "from vit_jax.utils.command import run_command\n"
        "from vit_jax.utils.streams import Unfailing, print_result\n"
        f"def main(argv):\n    {body}\n"
        "run_command(main)\n"
    )
    command = ["bash", "-c", shell, sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("flush", [True, False])
def test_an_output_that_finds_no_room_is_one_line(flush):
    code, _, errors = run_program(
        f"[print('line ' * 50, flush={flush}) for _ in range(500)]", '"$0" -c "$1" > /dev/full'
    )
    assert code == 1
    assert errors == ("vit_jax: error: stdout can't be written to (No space left on device)\n")


@pytest.mark.parametrize(
    ("shell", "reason"),
    [
        ('"$0" -c "$1" > /dev/full', "No space left on device"),
        ('"$0" -c "$1" >&-', "Bad file descriptor"),
        ('"$0" -c "$1" | true; exit "${PIPESTATUS[0]}"', None),
    ],
)
def test_a_result_that_can_not_be_written_ends_with_code_1(shell, reason):
    code, _, errors = run_program("print_result('line'); print_result('line ' * 50_000)", shell)
    assert code == 1
    line = f"vit_jax: error: stdout can't be written to ({reason})\n"
    assert errors == (line if reason else "")


def test_a_result_is_printed_without_escape_sequences(capsys):
    print_result("a\x1b[31m\nb", end="")
    assert capsys.readouterr().out == "a\\x1b[31m\nb"


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ('"$0" -c "$1" > /dev/full', 1),
        ('"$0" -c "$1" > /dev/full 2> /dev/full', 0),
        ('"$0" -c "$1" >&-', 0),
        ('"$0" -c "$1" | true; exit "${PIPESTATUS[0]}"', 0),
    ],
)
def test_a_log_that_can_not_be_written_ends_nothing(shell, said):
    body = "[Unfailing(sys.stdout).write('line ' * 50) for _ in range(500)] if sys.stdout else 0"
    code, _, errors = run_program(f"{body}; return 0", shell)
    assert code == 0
    assert errors.count("what is logged is lost") == errors.count("\n") == said


def test_a_second_interruption_ends_a_command_at_once_whatever_it_does():
    program = (
        "import hashlib\n"
        "from vit_jax.utils.command import run_command\n"
        "def main(argv):\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)\n"
        "run_command(main)\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)  # Until the computation has begun, which nothing in Python interrupts.
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.returncode == 130
        assert process.stderr.read() == "vit_jax: a second Ctrl-C: ends at once\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--outptu=x"], "unrecognized arguments: --outptu=x; did you mean '--output'?"),
        (["a", "--zzz"], "unrecognized arguments: --zzz; see"),
        (["a"], "the following arguments are required: --output"),
        (["--", "--outptu"], "the following arguments are required: --output"),
    ],
)
def test_an_unknown_option_is_named_before_those_that_are_missing(argv, message):
    parser = CommandParser(prog="example")
    parser.add_argument("IMAGE")
    parser.add_argument("--output", required=True)
    with pytest.raises(UserError) as error:
        parser.parse_args(argv)
    assert str(error.value).startswith(message)
