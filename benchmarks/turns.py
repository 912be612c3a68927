# SPDX-License-Identifier: Apache-2.0
"""Programs that take turns in being measured, so that what else a machine does hits all of them."""

import contextlib
import json
import os
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Peer:
    """A program in a process of its own, idle until it is its turn.

    It writes a line when it is ready, for which this waits: programs do not start side by side. For
    each line that it reads, a number of seconds, it writes a line of JSON: numbers, the same ones
    each time.

    Args:
      command: interpreter, script and arguments.
    """

    def __init__(self, command: Sequence[str]):
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TF_ENABLE_ONEDNN_OPTS": "0"},
            start_new_session=True,
        )
        assert self._process.stdout
        if not self._process.stdout.readline():
            raise SystemExit(f"{' '.join(command)}: ended before it was ready")

    def measure(self, seconds: float) -> dict[str, float]:
        """What the program says of a turn of that many seconds."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def start(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Peer]]:
    """All peers, by name; they end with the context."""
    peers: dict[str, Peer] = {}
    try:
        for name, command in commands.items():
            peers[name] = Peer(command)
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
