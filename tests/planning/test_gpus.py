# SPDX-License-Identifier: Apache-2.0
"""XLA's compiler for GPUs, where it is installed, and what happens where it is not."""

import jax
import jax.numpy as jnp
import pytest

from tests.tiny import PACKED, tiny_config
from vit_jax.config.load import override_config
from vit_jax.config.reduced import reduce_for_planning
from vit_jax.planning import gpus
from vit_jax.planning.gpus import NoGpuCompilerError, make_gpus
from vit_jax.planning.plan import make_plan
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


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_fused_attention_gathers_no_queries_keys_or_values(packed):
    try:
        make_gpus("h100", 1, 8)
    except NoGpuCompilerError as e:
        pytest.skip(str(e))
    sizes = {"hidden_size": 128, "mlp_dim": 256, "num_heads": 4, "patch_size": 4, "num_layers": 1}
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    config = tiny_config(
        "nowhere",
        **{f"model__{key}": value for key, value in sizes.items()},
        precision="bfloat16",
        data__batch_size=64,
        mesh=mesh,
    )
    transfers = {}
    for attention in ("xla", "fused"):
        changes = {"model.attention": attention} | (PACKED if packed else {})
        changed = override_config(config, changes).to_dict()
        reduced = reduce_for_planning(changed, num_classes=16, image_size=None if packed else 32)
        plan = make_plan(reduced, parse_topology("h100:8"), cache=None)
        assert plan["compiled_for"] == "gpu"
        kinds = [kernel["kind"] for kernel in plan["kernels"]]
        assert any("fmha" in kind for kind in kinds) == (attention == "fused")
        has_scores = any("bhqk" in kernel["layer"] for kernel in plan["kernels"])
        assert has_scores == (attention == "xla")
        transfers[attention] = {
            (c["kind"], tuple(c["axes"])): c["bytes"] for c in plan["collectives"]
        }
    queries = 64 // 4 * 65 * 128 // 2 * 2  # bytes of one device's part
    for key, sent in transfers["fused"].items():
        assert sent - transfers["xla"].get(key, 0) < queries, key
