# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: all processes save the same step and stop, and the run goes on."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from tests.clock import wait_until
from tests.runtime.test_processes import CONFIG_FILE, ROOT, finish, metric, run, start
from tests.tiny import tiny_config
from vit_jax.checkpoint.listing import list_steps
from vit_jax.observe.jsonl import read_metrics
from vit_jax.observe.ledger import read_ledger
from vit_jax.observe.progress import Monitor
from vit_jax.runtime import preemption
from vit_jax.runtime.preemption import RUN_AGAIN, Interrupted, Preempted, PreemptionGuard
from vit_jax.training.run import train

# Says when an evaluation begins, and takes a while over each of its batches.
SLOW_EVALUATION = CONFIG_FILE.replace(
    "evals__val__every=3,", "evals__val__every=3, evals__val__batch_size=4,"
).replace(
    "def get_config",
    """
import time
from vit_jax.evaluators import base

shard_batch, batches = base.shard_batch, []

def put_slowly(*args):
    if not batches:
        print("evaluating", flush=True)
    batches.append(None)
    time.sleep(0.2 if len(batches) < 13 else 0)
    return shard_batch(*args)

base.shard_batch = put_slowly

def get_config""",
)
ENDLESS = CONFIG_FILE.replace("total_steps=6", "total_steps=1000000")


def wait_for(process, text):
    """Reads the output of a process up to a line with the text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}: {process.stderr.read()}")


def saved_steps(folder):
    return sorted(int(p.name) for p in (folder / "workdir" / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_is_left_and_made_up_for(processes, data_dir, tmp_path):
    job = {"processes": processes, "devices": 4 // processes}
    with start(tmp_path, data_dir, **job, text=SLOW_EVALUATION) as started:
        wait_for(started[0], "evaluating")
        started[-1].send_signal(signal.SIGTERM)
        done = finish(started)
    assert [code for code, _, _ in done] == [RUN_AGAIN] * processes, done
    assert "stopped after step 3 of 6" in done[0][1]
    assert saved_steps(tmp_path) == [3]
    assert metric(tmp_path, "val/top1") == {}

    done = run(tmp_path, data_dir, **job)
    assert [code for code, _, _ in done] == [0] * processes, done
    assert list(metric(tmp_path, "val/top1")) == [3, 6]
    assert list(metric(tmp_path, "train/loss")) == [1, 2, 3, 4, 5, 6]


def test_processes_stop_after_the_same_step_when_one_is_told(data_dir, tmp_path):
    with start(tmp_path, data_dir, processes=2, devices=2, text=ENDLESS) as started:
        wait_for(started[0], "step 5/")
        started[1].send_signal(signal.SIGTERM)
        first, second = finish(started)
    assert (first[0], second[0]) == (RUN_AGAIN, RUN_AGAIN), (first, second)
    last = saved_steps(tmp_path)[-1]
    assert f"stopped after step {last} of 1000000" in first[1]
    assert "SIGTERM: saves after this step" in second[2]


def test_sigterm_before_anything_may_be_saved_ends_to_be_run_again(monkeypatch):
    ended = []
    monkeypatch.setattr(preemption, "end_now", lambda *end: ended.append(end))
    with PreemptionGuard():
        signal.raise_signal(signal.SIGTERM)
        wait_until(lambda: ended)
    assert ended == [("SIGTERM before the first step: there is nothing to save", RUN_AGAIN)]


# The test above has it without a process.
@pytest.mark.slow
def test_before_the_first_step_there_is_nothing_to_save(data_dir, tmp_path):
    with start(tmp_path, data_dir, processes=1, devices=4) as started:
        # What is compiled now takes seconds.
        wait_for(started[0], "compiling ...")
        started[0].send_signal(signal.SIGTERM)
        ((code, output, errors),) = finish(started)
    assert code == RUN_AGAIN, errors
    assert "SIGTERM before the first step" in errors
    assert "first step after" not in output


WAITS = """
import hashlib, time
from vit_jax.runtime.preemption import PreemptionGuard, Preempted, interruptible
with PreemptionGuard() as guard:
    guard.allow_saving()
    print("ready", flush=True)
    try:
        for _ in interruptible(iter(int, 1)):
            time.sleep(0.01)
    except Preempted:
        print("told", guard.should_stop(), flush=True)
    # One call, which no signal handler interrupts; as compilers do, it lets other threads run.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)
"""


@contextlib.contextmanager
def waiting():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            wait_for(process, "ready")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_second_signal_ends_it_at_once_whatever_it_does(number, name):
    with waiting() as process:
        process.send_signal(number)
        wait_for(process, "told True")
        process.send_signal(number)
        assert process.wait(120) == 128 + number
        first, second = process.stderr.read().splitlines()
        assert first.startswith(f"vit_jax: {name}: saves after this step")
        assert second == f"vit_jax: a second {name}: ends at once"


def test_the_handlers_of_before_are_back_afterwards():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with PreemptionGuard():
        inside = [signal.getsignal(number) for number in numbers]
        assert all(x != y for x, y in zip(before, inside, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_ctrl_c_is_an_interruption_while_there_is_nothing_to_save():
    with pytest.raises(KeyboardInterrupt), PreemptionGuard():
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_that_a_shell_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with PreemptionGuard() as guard:
            guard.allow_saving()
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert not guard.should_stop()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGTERM, Preempted),
        pytest.param(signal.SIGINT, Interrupted, marks=pytest.mark.slow),
    ],
)
def test_a_run_saves_and_stops_at_the_first_signal(number, error, data_dir, tmp_path, monkeypatch):
    def step(self, step, metrics, *, log):
        original(self, step, metrics, log=log)
        if step == 3:
            signal.raise_signal(number)
            # It is heard by another thread.
            wait_until(lambda: preemption._entered._received)

    original = Monitor.step
    config = tiny_config(data_dir, evals={}, total_steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", step)
        with pytest.raises(Preempted, match="stopped after step 3 of 6, which is saved") as raised:
            train(config, tmp_path)
    assert type(raised.value) is error
    assert list_steps(tmp_path) == [3]
    assert read_ledger(tmp_path)[-1]["cause"] == (
        "SIGTERM" if error is Preempted else "interrupted"
    )
    train(config, tmp_path)
    assert [r["step"] for r in read_metrics(tmp_path) if "train/loss" in r] == [1, 2, 4, 6]


def test_sigterm_while_a_finished_run_takes_itself_apart_changes_nothing():
    program = (
        "import atexit, os, signal, sys\n"
        "from vit_jax import main\n"
        "main.main = lambda argv: None\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['main', '--config=configs/digits.py', '--workdir=runs/none']\n"
        "main.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=600)
    assert done.returncode == 0
