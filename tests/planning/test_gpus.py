# SPDX-License-Identifier: Apache-2.0
"""XLA's compiler for GPUs, where it is installed, and what happens where it is not."""

import jax
import jax.numpy as jnp
import pytest

from vit_jax.planning import gpus
from vit_jax.planning.gpus import NoGpuCompilerError, make_gpus
from vit_jax.planning.topologies import explain_cpus, find_compiler, make_devices, parse_topology
from vit_jax.runtime.chips import GPUS


@pytest.fixture(params=["not installed", "of another version"])
def no_compiler(request, monkeypatch):
    """The compiler can't be used; a part of the message that says why."""
    make_gpus.cache_clear()
    if request.param == "not installed":
        monkeypatch.setattr(gpus, "find_version", lambda name: None)
        return r"pip install 'vit_jax\[gpu-plan\]'"

    def fail(*_, **__):
        raise RuntimeError("no\nsuch platform")

    monkeypatch.setattr(gpus, "find_version", lambda name: "9.9")
    monkeypatch.setattr(gpus.topologies, "get_topology_desc", fail)
    return "JAX 9.9 can't use it: no such platform"


def test_without_the_compiler_cpus_take_the_place_of_gpus(no_compiler):
    with pytest.raises(NoGpuCompilerError, match=no_compiler):
        make_gpus("h100", 1, 4)
    topology = parse_topology("h100:4", num_slices=2)
    devices = make_devices(topology)
    assert find_compiler(devices) == "cpu"
    assert len(devices) == 8
    assert "gpu-plan" in explain_cpus(topology) or "9.9" in explain_cpus(topology)


def test_every_gpu_has_a_description_for_the_compiler():
    assert set(gpus._CARDS) == set(GPUS)
    for name, chip in GPUS.items():
        card = gpus._CARDS[name]
        assert card.description == chip.device_kind
        assert card.bandwidth == pytest.approx(chip.hbm_bandwidth, rel=0.05)
        # The table has what JAX takes of the memory by default.
        assert 0.75 * card.memory == pytest.approx(chip.hbm_bytes, rel=0.1)


@pytest.mark.parametrize("name", sorted(GPUS))
def test_a_program_is_compiled_for_each_gpu(name):
    try:
        devices = make_gpus(name, 2, 4)
    except NoGpuCompilerError as e:
        pytest.skip(str(e))
    assert len(devices) == 8
    assert find_compiler(devices) == "gpu"
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding)
    program = jax.jit(lambda x: jnp.tanh(x) + 1).lower(x).compile().as_text()
    assert "kind=kLoop" in program
