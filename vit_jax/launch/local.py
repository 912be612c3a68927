# SPDX-License-Identifier: Apache-2.0
"""Starts a job of several processes on this machine.

The arguments after -- are those of vit_jax.main.

Examples:
  python -m vit_jax.launch.local -n 4 -- --config=configs/digits.py --workdir=runs/digits4
"""

import contextlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.signals import INTERRUPTED, RUN_AGAIN
from vit_jax.utils.streams import Unfailing, print_result

# Seconds from the failure of one process until the others are killed.
_GRACE_S = 20.0
# Exit codes after which a job runs again: it asks for that, or one of its processes was killed, for
# example because the machine is out of memory.
_AGAIN = (RUN_AGAIN, 128 + signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code of the first process that failed, else 0."""
    parser = CommandParser(prog="python -m vit_jax.launch.local", description=__doc__)
    add = parser.add_argument
    add("-n", "--num_processes", type=int, required=True, help="Start this many processes.")
    add(
        "--max_runs",
        type=int,
        default=10,
        help="Run the job at most this many times, again after a failure that may pass. The "
        "default is %(default)s.",
    )
    add("--dry_run", action="store_true", help="Print the commands and run nothing.")
    add("train", nargs="+", help="Pass these arguments to vit_jax.main; they come after --.")
    args = parser.parse_args(arguments)
    for flag, value in (("-n ", args.num_processes), ("--max_runs=", args.max_runs)):
        if value < 1:
            parser.error(f"{flag}{value}: expected at least 1")
    if args.dry_run:
        for command in make_commands(args.train, args.num_processes, port=1234):
            print_result(shlex.join(command))
        return 0
    code = 0
    for run in range(args.max_runs):
        if run:
            _print(f"launch: run {run + 1} of {args.max_runs}, after exit code {code}\n")
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        code, signalled = run_once(make_commands(args.train, args.num_processes, port=port))
        if code not in _AGAIN or signalled:
            break
    return code


def make_commands(train: Sequence[str], num_processes: int, *, port: int) -> list[list[str]]:
    """The command of each process."""
    job = [f"--coordinator=localhost:{port}", f"--num_processes={num_processes}"]
    command = [sys.executable, "-m", "vit_jax.main", *train, *job]
    return [[*command, f"--process_id={i}"] for i in range(num_processes)]


def run_once(commands: Sequence[Sequence[str]]) -> tuple[int, bool]:
    """Runs processes at the same time until all end, and ends all if one fails.

    Their output is printed line by line, with the number of the process. SIGTERM and Ctrl-C are
    forwarded to all of them.

    Returns:
      The exit code of the first process that fails, otherwise 0, and whether a signal was received.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pipes |= {"encoding": "utf-8", "errors": "backslashreplace"}
    started = [subprocess.Popen(command, start_new_session=True, **pipes) for command in commands]
    readers = [
        threading.Thread(target=_copy, args=(i, process.stdout), daemon=True)
        for i, process in enumerate(started)
    ]
    for reader in readers:
        reader.start()
    signalled = False

    def forward(number: int, _: object) -> None:
        nonlocal signalled
        signalled = True
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = _wait(started)
    finally:
        for process in started:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    for reader in readers:
        reader.join()
    return code, signalled


def _wait(started: Sequence[subprocess.Popen]) -> int:
    first, deadline = 0, None
    while None in (codes := [process.poll() for process in started]):
        failed = [code for code in codes if code]
        if failed and deadline is None:
            first = _exit_code(failed[0])
            deadline = time.monotonic() + _GRACE_S
            if first not in (RUN_AGAIN, INTERRUPTED):  # Otherwise all of them are ending.
                for process in started:
                    process.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.05)
    return first or next((_exit_code(code) for code in codes if code), 0)


def _exit_code(code: int) -> int:
    """The exit code as shells count: 128 + N for signal N, which `subprocess` reports as -N."""
    return code if code > 0 else 128 - code


def _copy(index: int, output: IO[str] | None) -> None:
    with contextlib.suppress(ValueError):
        for line in output or ():
            _print(f"[{index}] {line}")


def _print(text: str) -> None:
    # The processes would wait if their output were not read to its end.
    stream = Unfailing(sys.stdout)
    stream.write(text)
    stream.flush()


if __name__ == "__main__":
    run_command(main)
