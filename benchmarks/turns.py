# SPDX-License-Identifier: Apache-2.0
"""Programs that take turns in being measured, so that what else a machine does hits all of them."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vit_jax.utils.command import run_command

ROOT = Path(__file__).parent.parent


class Peer:
    """A program in a process of its own, idle until it is its turn.

    It writes a line when it is ready. For each line that it reads, a number of seconds, it writes a
    line of JSON: numbers, the same ones each time.

    Args:
      command: interpreter, script and arguments.
    """

    def __init__(self, command: Sequence[str]):
        self._command = " ".join(command)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TF_ENABLE_ONEDNN_OPTS": "0"},
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        """Waits for the first line of the program.

        Raises:
          SystemExit: the program has ended.
        """
        self._read_line("ended before it was ready")

    def measure(self, seconds: float) -> dict[str, float]:
        """Returns the numbers that the program reports of a turn of that many seconds.

        Raises:
          SystemExit: the program has ended.
        """
        assert self._process.stdin
        # A program that has ended is reported by the line that is missing.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
        return json.loads(self._read_line("ended before it had measured"))

    def close(self) -> None:
        """Kills the program."""
        self._process.kill()
        self._process.wait()

    def _read_line(self, missing: str) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._command}: {missing}")
        return line


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a benchmark as a command; SIGTERM ends it as Ctrl-C does, with its peers."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(main)


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """Delays SIGINT and SIGTERM to the end of the context."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


@contextlib.contextmanager
def start(
    commands: Mapping[str, Sequence[str]], *, deadline: float = float("inf")
) -> Iterator[dict[str, Peer]]:
    """Starts the peers, by name, one after the other; they end with the context.

    From `deadline` on, in seconds of `time.monotonic`, no peer is started.
    """
    peers: dict[str, Peer] = {}
    try:
        for name, command in commands.items():
            if time.monotonic() >= deadline:
                break
            with _held_signals():  # else a peer could start that nobody ends
                peers[name] = Peer(command)
            peers[name].wait_until_ready()
        yield peers
    finally:
        for peer in peers.values():
            peer.close()


def compare(
    peers: Mapping[str, Peer], *, ours: str, rounds: int, seconds: float, show: str
) -> dict[str, Any]:
    """Measures the peers by turns, in an order that rotates.

    Args:
      peers: by name.
      ours: which of them the others are compared with.
      rounds: turns of each.
      seconds: of a turn.
      show: the number of which each round is kept.

    Returns:
      For each peer the medians of its numbers, the medians of their ratios to ours in the same
      round (`..._of_vit_jax`), and `rounds`.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    names = list(peers)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name].append(peers[name].measure(seconds))
    results = {}
    for name, theirs in runs.items():
        results[name] = {
            key: round(statistics.median(run[key] for run in theirs), 1) for key in theirs[0]
        }
        for key in theirs[0]:
            pairs = zip(theirs, runs[ours], strict=True)
            ratio = statistics.median(their[key] / our[key] for their, our in pairs)
            results[name][f"{key}_of_vit_jax"] = round(ratio, 3)
        results[name]["rounds"] = [round(run[show], 1) for run in theirs]
    return results
