# SPDX-License-Identifier: Apache-2.0
"""Names of topologies, and what is said of those that can't be had."""

import importlib.util

import pytest

from vit_jax.planning import topologies
from vit_jax.planning.topologies import make_devices, parse_topology, slice_of
from vit_jax.runtime.chips import GPUS, TPUS, find_chip
from vit_jax.utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "num_slices", "devices", "chips"),
    [
        ("v5e:16x16", 2, 512, 512),
        ("v4:2x2x4", 1, 16, 16),
        ("tpu7x:2x2x4", 1, 32, 16),
        ("h100:8", 4, 32, 32),
        ("cpu:8", 1, 8, 8),
    ],
)
def test_a_name_says_how_many_devices(name, num_slices, devices, chips):
    topology = parse_topology(name, num_slices=num_slices)
    assert (topology.num_devices, topology.num_chips) == (devices, chips)
    assert topology.is_tpu == name.startswith(("v", "tpu"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v9:4x4", "'v9:4x4': no such kind of device; "),
        ("zzz:1", "there is: a100, b200, cpu, h100, h200, tpu7x, v4, v5e, v5p, v6e"),
        ("v5e", "expected a shape, as in v5e:4x4"),
        ("v5p:4xx4", "as in v5p:4x4x4"),
        ("h100:0", "as in h100:8"),
        ("h100:2x8", "expected the number of devices of a host, as in h100:16"),
        ("cpu:2x4", "as in cpu:8"),
        ("l40s:8", "there is: a100, b200"),
    ],
)
def test_an_unknown_name_gets_one_line_with_what_there_is(name, expected):
    with pytest.raises(UserError) as error:
        parse_topology(name)
    assert expected in str(error.value)


def test_without_libtpu_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vit_jax\[tpu-plan\]'"):
        make_devices(parse_topology("v5e:2x2"))


def test_more_cpus_than_jax_has_is_an_error_that_says_how_to_get_them():
    with pytest.raises(UserError, match="device_count=64"):
        make_devices(parse_topology("cpu:64"))


def test_hosts_of_gpus_stand_in_for_slices():
    topology = parse_topology("h100:4", num_slices=2)
    assert slice_of(topology, make_devices(topology)) == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_shape_that_does_not_exist_is_refused_in_the_words_of_libtpu():
    with pytest.raises(UserError, match="not divisible"):
        make_devices(parse_topology("v5e:3x5"))


def test_chips_are_found_by_the_names_that_jax_gives():
    assert find_chip("TPU v5 lite") is TPUS["v5e"]
    assert find_chip("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert find_chip("NVIDIA H100 PCIe") is None
    # A TPU7x chip of 2307 TFLOP/s is two devices.
    assert TPUS["tpu7x"].flops * TPUS["tpu7x"].per_chip == 2307e12


@pytest.mark.parametrize("chip", [*TPUS.values(), *GPUS.values()], ids=lambda c: c.name)
def test_every_chip_is_faster_near_than_far(chip):
    assert chip.hbm_bandwidth > chip.ici_bandwidth > chip.dcn_bandwidth > 0
    assert chip.source
