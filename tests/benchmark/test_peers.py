# SPDX-License-Identifier: Apache-2.0
"""The programs that the training step is compared with."""

import json
import os
import signal
import subprocess
import sys

import pytest

from benchmarks.step import PEERS, VARIATIONS, make_command, parse_variant
from benchmarks.turns import ROOT
from vit_jax.config.precision import PRECISIONS


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Ti/16", ("Ti/16", 224, 32)),
        ("S/16:256", ("S/16", 224, 256)),
        ("L/16@384:16", ("L/16", 384, 16)),
    ],
)
def test_a_variant_may_have_a_size_and_a_batch_size(text, found):
    assert parse_variant(text) == found


@pytest.mark.parametrize("text", ["S", "S/16@", "S/16:x", "S/32"])
def test_other_variants_are_refused(text):
    with pytest.raises(SystemExit, match=rf"--variants {text}: expected NAME"):
        parse_variant(text)


@pytest.mark.parametrize("peer", [*PEERS, *VARIATIONS])
def test_each_peer_has_an_interpreter_and_a_program(peer):
    command = make_command(peer, "B/16", 224, 8, "torch", tcmalloc="lib.so")
    *_, program, name, variant, size, batch_size, overrides = command
    assert program.endswith("step_peers.py")
    assert name == ("vit_jax" if peer in VARIATIONS else peer)
    assert (variant, size, batch_size) == ("B/16", "224", "8")
    assert ("torch" in command) == peer.startswith("timm")
    assert ("LD_PRELOAD=lib.so" in command) == (peer == "vit_jax_tcmalloc")
    assert json.loads(overrides).get("precision") in (None, *PRECISIONS)


# A benchmark whose peers become ready and then do what they are told; it prints their process ids.
BENCHMARK = '''
import signal, sys
from benchmarks import {name} as benchmark, turns

# A shell starts what is in the background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Peer(turns.Peer):
    def __init__(self, command):
        program = """import time; print(1, flush=True); {act}"""
        super().__init__([sys.executable, "-S", "-c", program])

    def wait_until_ready(self):
        super().wait_until_ready()
        print(self._process.pid, flush=True)

turns.Peer = Peer
if "{name}" == "input":
    benchmark.KINDS = {{"8x8": (8, 8, 90, 2)}}
    benchmark.PACKS = {{}}
turns.run(benchmark.main)
'''


def start_benchmark(name, tmp_path, act):
    """Starts it, and returns it with the process id of its first peer."""
    arguments = {"step": ["--peers", "vit_jax"], "input": [f"--folder={tmp_path}"]}
    process = subprocess.Popen(
        [sys.executable, "-c", BENCHMARK.format(name=name, act=act), *arguments[name]],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, next(int(line) for line in process.stdout if line.strip().isdigit())


def assert_is_gone(pid):
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("name", "number"),
    [("step", signal.SIGINT), ("step", signal.SIGTERM), ("input", signal.SIGTERM)],
)
def test_a_benchmark_that_is_cut_short_ends_its_peers_and_is_one_line(name, number, tmp_path):
    process, peer = start_benchmark(name, tmp_path, "time.sleep(600)")
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (130, "vit_jax: interrupted\n")
    assert_is_gone(peer)


def test_a_benchmark_whose_reader_has_seen_enough_ends_in_silence(tmp_path):
    numbers = {"images_per_sec": 1, "first_step_s": 1, "peak_gib": 1}
    act = f"[print('{json.dumps(numbers)}', flush=True) for _ in iter(input, '')]"
    process, peer = start_benchmark("step", tmp_path, act)
    process.stdout.close()
    with process:
        assert (process.stderr.read(), process.wait(timeout=600)) == ("", 1)
    assert_is_gone(peer)


def test_a_peer_that_ends_in_its_turn_is_one_line(tmp_path):
    process, _ = start_benchmark("step", tmp_path, "input()")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert errors.endswith(": ended before it had measured\n")
    assert len(errors.splitlines()) == 1
