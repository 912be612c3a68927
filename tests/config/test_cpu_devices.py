# SPDX-License-Identifier: Apache-2.0
"""On a CPU the batch is split over the cores, as far as it can be."""

import os
import subprocess
import sys

import pytest

from vit_jax.config import cpu_devices
from vit_jax.config.cpu_devices import count_cpu_devices
from vit_jax.runtime.cpu_devices import set_cpu_devices
from vit_jax.utils.errors import UserError

LINE = "decode|inception_crop(224)"
DATA = {"batch_size": 96, "preprocess": LINE}


@pytest.fixture
def machine(monkeypatch):
    """One that says nothing of devices; call it to choose its cores."""
    monkeypatch.delenv("XLA_FLAGS")
    return lambda cores: monkeypatch.setattr(cpu_devices, "count_cores", lambda: cores)


@pytest.mark.parametrize(
    ("cores", "config", "count"),
    [
        (2, {"data": DATA}, 2),
        (1, {"data": DATA}, 1),
        (5, {"data": DATA}, 4),  # 5 does not divide the batch
        (64, {"data": DATA}, 8),
        (2, {"data": {"batch_size": 128, "preprocess": "decode|resize(32)"}}, 2),
        (2, {"data": {"batch_size": 126, "preprocess": "decode|resize(32)"}}, 1),
        (2, {"data": {"batch_size": 97, "preprocess": LINE}}, 1),
        (4, {"data": DATA, "optimizer": {"accum_steps": 3}}, 4),
        (4, {"data": DATA, "optimizer": {"accum_steps": 16}}, 3),
        (4, {"data": DATA, "evals": {"val": {"batch_size": 6}, "test": {}}}, 3),
        (4, {"data": DATA, "evals": None}, 4),
        (4, {"data": DATA, "mesh": {"fsdp": 2}}, None),
        (4, {}, None),
        (4, {"data": {"batch_size": "many", "preprocess": LINE}}, None),
        (4, {"data": {"batch_size": 96, "preprocess": "decade"}}, None),
    ],
)
def test_as_many_as_cores_that_divide_all_batches(cores, config, count, machine):
    machine(cores)
    assert count_cpu_devices(config) == count


def test_what_the_environment_says_counts(machine, monkeypatch):
    machine(2)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert count_cpu_devices({"data": DATA}) is None
    with pytest.raises(UserError, match="--cpu_devices=2: XLA_FLAGS has a number too"):
        set_cpu_devices(2)


def test_a_number_that_is_none_is_refused(machine):
    with pytest.raises(UserError, match="--cpu_devices=0: expected at least 1"):
        set_cpu_devices(0)


def test_the_devices_are_there():
    program = "import jax; from vit_jax.runtime.cpu_devices import set_cpu_devices as s; s(3)"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; print(jax.device_count('cpu'))"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout == "3\n"
