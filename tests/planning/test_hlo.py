# SPDX-License-Identifier: Apache-2.0
"""What compiled programs move, in snippets of HLO and in a program compiled here."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.parallel.mesh import make_mesh
from vit_jax.planning.hlo import Collective, Program, parse_groups
from vit_jax.planning.kernels import list_kernels

TESTDATA = Path(__file__).parent.parent / "testdata" / "hlo"
MESH = {"data": 4, "fsdp": 4, "tensor": 1}


@pytest.fixture(scope="module")
def loop():
    return Program((TESTDATA / "tpu_loop.txt").read_text())


def collectives(program, *args):
    return program.collectives(program.transfers(*args))


def find(collectives, kind, axes):
    (found,) = [c for c in collectives if (c.kind, c.axes) == (kind, axes)]
    return found


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("dimensions={0}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_are_read_in_all_notations(text, groups):
    np.testing.assert_array_equal(parse_groups(f"{text}, use_global_device_ids=true", 8), groups)


def test_a_transfer_in_a_loop_counts_as_often_as_the_loop_runs(loop):
    # Twice in the text, under one number: once in each of the 12 rounds. Each of 4 devices sends
    # its bfloat16 shard to the 3 others.
    gather = find(collectives(loop, MESH), "all-gather", ("fsdp",))
    assert gather == Collective("all-gather", ("fsdp",), 12, 12 * 3 * 384 * 384 * 2, 0)


def test_a_reduce_scatter_is_known_under_its_tpu_name(loop):
    scatter = find(collectives(loop, MESH), "reduce-scatter", ("fsdp",))
    assert scatter.bytes == 1536 * 384 * 2 * 3 // 4


def test_all_reduce_moves_twice_what_is_reduced(loop):
    reduce = find(collectives(loop, MESH), "all-reduce", ("data", "fsdp"))
    assert reduce.bytes == 2 * 384 * 4 * 15 // 16


def test_permutations_name_the_axis_they_walk_along(loop):
    assert find(collectives(loop, MESH), "collective-permute", ("data",)).bytes == 384 * 4


def test_between_slices_each_device_sends_its_share(loop):
    slices = [i // 8 for i in range(16)]
    reduce = find(collectives(loop, MESH, slices), "all-reduce", ("data", "fsdp"))
    assert reduce.bytes == 2 * 384 * 4 * 7 // 8
    assert reduce.dcn_bytes == 2 * (384 * 4 // 8) // 2
    # Groups within a slice send nothing out of it.
    assert find(collectives(loop, MESH, slices), "all-gather", ("fsdp",)).dcn_bytes == 0


def test_bytes_in_fast_memory_are_not_traffic_of_the_main_one(loop):
    shard, whole, vector = 384 * 384 * 2, 1536 * 384 * 2, 384 * 4
    # Each round copies a shard and reads it for two fusions, whose results lie in fast memory.
    # After the loop a vector is read to be summed, one is read and written to be permuted, and a
    # matrix is read to be scattered.
    assert loop.hbm_bytes == 12 * (2 * shard + 2 * shard) + vector + 2 * vector + whole


@pytest.mark.parametrize("target", ["{{100000,200000},{100001,200001}}", '"{1,2}x{0:1}"'])
def test_hosts_transfer_between_slices_of_tpus(target):
    text = """HloModule m

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0:T(4,128)} parameter(0)
  %after-all.1 = token[] after-all()
  %send.1 = (f32[8,4]{1,0:T(4,128)}, u32[], token[]) send(%p, %after-all.1), channel_id=6, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target=TARGET,\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=6, is_host_transfer=true
}
"""
    (found,) = collectives(
        Program(text.replace("TARGET", target)),
        {"data": 2, "fsdp": 2},
        [0, 0, 1, 1],
        [100000, 100001, 200000, 200001],
    )
    assert found == Collective("all-reduce", ("data",), 1, 0, 8 * 4 * 4)


def test_transfers_of_a_compiled_program_are_those_of_its_shardings():
    mesh = make_mesh(data=4, fsdp=2)
    layers, batch, width = 5, 64, 128
    x = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    w = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))

    def loss(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    step = jax.jit(jax.grad(loss), in_shardings=(w, x), out_shardings=w)
    compiled = step.lower(jnp.zeros((layers, width, width)), jnp.zeros((batch, width))).compile()
    program = Program(compiled.as_text() or "")
    found = collectives(program, dict(mesh.shape))
    gathers = find(found, "all-gather", ("fsdp",))
    # Forward and backward gather each layer's half from one other device.
    assert gathers.count == 2 * layers
    assert gathers.bytes == 2 * layers * width * width * 4 // 2
    assert layers in program.runs.values()
    assert {axis for c in found for axis in c.axes} == {"data", "fsdp"}


def test_bytes_of_a_program_without_loops_are_those_that_the_compiler_counts():
    def loss(w, x):
        for i in range(3):
            x = jnp.tanh(x @ w[i]) + x
        return (x**2).mean()

    step = jax.jit(jax.grad(loss)).lower(jnp.zeros((3, 64, 64)), jnp.zeros((128, 64)))
    compiled = step.compile()
    costs: Any = compiled.cost_analysis()
    assert Program(compiled.as_text() or "").hbm_bytes == pytest.approx(
        costs["bytes accessed"], rel=1e-3
    )


def test_of_stacked_layers_a_fusion_moves_the_one_it_works_on():
    # As TPUs compile scans: what takes the slice, or copies the stack at its place into the layout
    # of the update, is a fusion within the fusion.
    program = Program((TESTDATA / "nested_fusions.txt").read_text())
    layer, index = 8 * 128 * 2, 4
    reads, writes = 2 * layer + index, (1 + 2) * layer + index
    assert program.hbm_bytes == reads + writes


@pytest.mark.parametrize(
    ("estimates", "cycles"),
    [((700, 20), 4 * 700 + 20), ((2**63 - 1, 2**63 - 1), None), ((), None)],
)
def test_cycles_are_those_that_the_compiler_expects_of_each_run(estimates, cycles):
    notes = [f', backend_config={{"estimated_cycles":"{n}"}}' for n in estimates] or ["", ""]
    trips = 'backend_config={"known_trip_count":{"n":"4"}}'
    text = f"""
HloModule loop

%body (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %tanh = f32[8]{{0}} tanh(%x){notes[0]}
}}

%condition (y: f32[8]) -> pred[] {{
  %y = f32[8]{{0}} parameter(0)
  ROOT %true = pred[] constant(true)
}}

ENTRY %main (z: f32[8]) -> f32[8] {{
  %z = f32[8]{{0}} parameter(0)
  %loop = f32[8]{{0}} while(%z), condition=%condition, body=%body, {trips}
  ROOT %copy = f32[8]{{0}} copy(%loop){notes[1]}
}}
"""
    kernels = list_kernels(Program(text))
    found = [k.count * k.cycles for k in kernels if k.cycles is not None]
    assert (sum(found) if found else None) == cycles
