# SPDX-License-Identifier: Apache-2.0
"""The programs that the training step is compared with."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest

from benchmarks import step, turns
from benchmarks.step import PEERS, VARIATIONS, describe_clock, make_command, parse_variant
from benchmarks.step_peers import compare_with_prediction, describe
from benchmarks.turns import ROOT
from tests.planning.test_kernels import PROGRAM
from vit_jax.config.precision import PRECISIONS
from vit_jax.models.flops import train_flops
from vit_jax.models.variants import make_vit
from vit_jax.planning.hlo import Program
from vit_jax.planning.kernels import list_kernels, time_kernels
from vit_jax.runtime.chips import GPUS


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


def test_a_step_is_compared_with_the_time_of_its_kernels():
    model = make_vit(
        num_classes=3, patch_size=16, hidden_size=8, num_layers=1, num_heads=1, mlp_dim=8
    )
    experiment = types.SimpleNamespace(model=model)
    text, chip = PROGRAM.read_text(), GPUS["h200"]
    known = describe(text, chip, experiment, 32)
    kernels = time_kernels(list_kernels(Program(text)), chip)
    assert known["predicted_ms"] == pytest.approx(1e3 * sum(one.seconds for one in kernels))
    # 100 images in twice the predicted time.
    speed = 100 / (2e-3 * known["predicted_ms"])
    row = compare_with_prediction(speed, 100, known)
    assert row["step_ms"] == pytest.approx(2 * known["predicted_ms"])
    assert row["error_percent"] == pytest.approx(-50)
    mfu = speed * train_flops(model, (32, 32)) / chip.flops
    assert row["mfu_percent"] == pytest.approx(100 * mfu)
    assert not describe_clock({"images_per_sec": 1})
    row = {"mfu_percent": 43.21, "step_ms": 30, "predicted_ms": 27, "error_percent": -10}
    assert describe_clock(row) == "  MFU 43.2 %, 30.0 ms measured, 27.0 predicted (-10 %)"


def test_nothing_is_predicted_for_a_card_that_is_not_in_the_table():
    assert describe("", None, None, 32) == {}
    assert compare_with_prediction(10.0, 100, {}) == {}


@pytest.fixture
def peers(monkeypatch):
    """Peers that become ready at once, each after a minute by the clock."""
    now = [0.0]

    class Peer:
        def __init__(self, command):
            now[0] += 60
            self.name = command

        def wait_until_ready(self):
            pass

        def measure(self, seconds):
            return {"images_per_sec": 10.0, "first_step_s": 1.0, "peak_gib": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(turns, "Peer", Peer)
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(turns, "time", clock)
    monkeypatch.setattr(step, "time", clock)
    monkeypatch.setattr(step, "describe_device", lambda: "NVIDIA T4")


def test_levers_belong_to_the_first_variant_and_time_is_limited(peers, capsys, tmp_path):
    path = tmp_path / "step.json"
    levers = ("vit_jax_xla_attention", "vit_jax_scan", "flax_plain")
    variants = ("--variants", "B/16:8", "S/16:8", "--peers", "vit_jax")
    step.main([*variants, "--levers", *levers, "--within=5", "--rounds=1", f"--json={path}"])
    out = capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    # Three of the peers are started in three minutes; two more are for what is under way.
    assert list(results) == ["B/16:8"]
    assert list(results["B/16:8"]["peers"]) == ["vit_jax", "vit_jax_xla_attention", "vit_jax_scan"]
    assert "left out, because 5 minutes were over: B/16:8 flax_plain, S/16:8 vit_jax" in out
    assert "nothing is predicted: NVIDIA T4 is not in vit_jax/runtime/chips.py" in out


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
