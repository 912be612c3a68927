# SPDX-License-Identifier: Apache-2.0
"""Processes of a job that die, stop or fail are named by the others, which end to be run again."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax.utils.signals import RUN_AGAIN

ROOT = Path(__file__).parent.parent.parent

# Three processes without a job of JAX, whose collective operations are files.
MEMBER = """
import json, sys, time
from pathlib import Path
from unittest.mock import MagicMock

# It takes seconds to import, and two of its functions are called, which are replaced below.
for name in ("", ".numpy", ".sharding", ".experimental", ".experimental.multihost_utils"):
    sys.modules["jax" + name] = MagicMock()

from vit_jax.runtime import heartbeat

me, folder, what = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def broadcast_from_process_0(value):
    file = folder / "told"
    if me == 0:
        file.with_suffix(".tmp").write_text(json.dumps(value))
        file.with_suffix(".tmp").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return json.loads(file.read_text())

heartbeat.jax.process_count, heartbeat.jax.process_index = lambda: 3, lambda: me
same = what == "same"
heartbeat.host_names = lambda: ("one",) * 3 if same else ("left", "right", "right")
heartbeat.share_machine = lambda: same
heartbeat.broadcast_from_process_0 = broadcast_from_process_0
heartbeat._FAILED_S = 0.5

def meet(place):
    (folder / f"{place}{me}").touch()
    while len(list(folder.glob(f"{place}?"))) < 3:
        time.sleep(0.01)

meet("imported")
beat = heartbeat.Heartbeat(4.0, on_exit=lambda words: print("words", words, flush=True))
with beat:
    if me == 0:
        (folder / "address").write_text(beat._server.getsockname()[0])
    print("ready", flush=True)
    if me == 1 and what == "raise":
        raise MemoryError
    if what in ("end", "same"):
        meet("in")
        time.sleep(0.5 * me)
    else:
        time.sleep(600)
time.sleep(2)
"""


@contextlib.contextmanager
def members(folder, what):
    command = [sys.executable, "-c", MEMBER]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [subprocess.Popen([*command, str(i), str(folder), what], **pipes) for i in range(3)]
    try:
        for process in started:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(0.5)  # All have been heard of.
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("number", "victim", "words"),
    [
        (signal.SIGKILL, 0, "process 0 on left is gone"),
        (signal.SIGSTOP, 2, "process 2 on right has not been heard of for "),
    ],
)
def test_a_process_that_dies_or_stops_is_named_by_all_others(number, victim, words, tmp_path):
    with members(tmp_path, "stay") as started:
        started[victim].send_signal(number)
        for i in {0, 1, 2} - {victim}:
            output, errors = started[i].communicate(timeout=600)
            assert started[i].returncode == RUN_AGAIN, errors
            assert f"vit_jax: {words}" in errors
            assert f"words {words}" in output


def test_one_that_fails_alone_is_named_with_its_error(tmp_path):
    with members(tmp_path, "raise") as started:
        for i in (0, 2):
            _, errors = started[i].communicate(timeout=600)
            assert started[i].returncode == RUN_AGAIN, errors
            assert "process 1 on right has ended with MemoryError" in errors
        assert started[1].wait(600) == 1


@pytest.mark.parametrize(("what", "address"), [("end", {"::", "0.0.0.0"}), ("same", {"127.0.0.1"})])
def test_processes_that_end_in_turn_miss_nobody(what, address, tmp_path):
    with members(tmp_path, what) as started:
        for process in started:
            _, errors = process.communicate(timeout=600)
            assert (process.returncode, errors) == (0, "")
    # Of one machine, no other one can reach the port.
    assert (tmp_path / "address").read_text() in address
