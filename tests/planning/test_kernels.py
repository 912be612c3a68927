# SPDX-License-Identifier: Apache-2.0
"""Kernels of compiled programs, and the time that they should take."""

from pathlib import Path

import pytest

from vit_jax.planning.hlo import Program
from vit_jax.planning.kernels import (
    Kernel,
    find_waits,
    list_kernels,
    merge_alike,
    time_kernels,
    transfer_seconds,
)
from vit_jax.runtime.chips import GPUS, TPUS

# Gradients of attention by cuDNN (2 images, 200 tokens, 12 heads, width 64) and of an embedding of
# 16 x 16 patches (2 images of 224 pixels), compiled by XLA for an H200.
PROGRAM = Path(__file__).parents[1] / "testdata" / "hlo" / "gpu_attention.txt"
H200, V5E, TPU7X = GPUS["h200"], TPUS["v5e"], TPUS["tpu7x"]
SCORES = 2 * 12 * 200 * 200 * 64
TOKENS = 2 * 200 * 12 * 64
BF16, F32, I32 = 2, 4, 4


@pytest.fixture(scope="module")
def kernels():
    return list_kernels(Program(PROGRAM.read_text()))


def find(kernels, word):
    return [k for k in kernels if word in k.kind]


def test_attention_has_two_products_forward_and_five_backward(kernels):
    forward, backward = find(kernels, "fmha")
    assert (forward.layer, forward.backward) == ("dot_product_attention_fwd", False)
    assert (backward.layer, backward.backward) == ("dot_product_attention_bwd", True)
    assert forward.flops == 2 * 2 * SCORES
    assert backward.flops == 5 * 2 * SCORES


def test_attention_moves_tokens_and_no_scores(kernels):
    forward, backward = find(kernels, "fmha")
    lengths, statistics = 2 * 2 * I32, 2 * 12 * 200 * F32
    assert forward.bytes == 4 * TOKENS * BF16 + statistics + lengths
    assert backward.bytes == 8 * TOKENS * BF16 + statistics + lengths


def test_the_gradient_of_an_embedding_counts_as_much_as_the_embedding(kernels):
    assert [k.flops for k in find(kernels, "conv")] == [2 * 2 * 196 * 768 * (16 * 16 * 3)] * 2


def test_products_of_fusions_and_of_cublas_are_counted():
    text = """
HloModule products

%fused (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %dot = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tanh = bf16[64,16]{1,0} tanh(%dot), metadata={op_name="jit(f)/Dense_0/tanh"}
}

ENTRY %main (x: bf16[64,32], y: bf16[32,16]) -> bf16[16,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %y = bf16[32,16]{1,0} parameter(1)
  %z = bf16[64,16]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused
  %call = (bf16[16,16]{1,0}, s8[4096]{0}) custom-call(%z, %z), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(f)/transpose(jvp(Model))/Dense_1/dot_general"}, backend_config={\
"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}
  ROOT %out = bf16[16,16]{1,0} get-tuple-element(%call), index=0
}
"""
    fusion, call = list_kernels(Program(text))
    moved = BF16 * (64 * 32 + 32 * 16 + 64 * 16)
    assert fusion == Kernel("Dense_0/tanh", False, "fusion", 1, moved, 2 * 64 * 16 * 32)
    # Not the scratch memory.
    assert call.bytes == BF16 * (16 * 16 + 2 * 64 * 16)
    assert call.flops == 2 * 16 * 16 * 64
    assert (call.layer, call.backward) == ("Dense_1/dot_general", True)


def kernel(*, kind="fusion", layer="x", count=1, moved=0, flops=0, cycles=None):
    return Kernel(layer, False, kind, count, moved, flops, cycles)


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        ({"moved": int(0.8 * 4.8e9)}, 1e-3, "memory"),
        ({"flops": int(0.68 * 989e9)}, 1e-3, "compute"),
        ({"moved": 1000, "flops": 1000}, 2.5e-6, "launch"),
        ({"moved": int(0.8 * 4.8e9), "count": 12}, 12e-3, "memory"),
    ],
)
def test_a_kernel_takes_as_long_as_the_slowest_of_its_works(work, seconds, bound):
    (timed,) = time_kernels([kernel(**work)], H200)
    assert timed.seconds == pytest.approx(seconds)
    assert timed.bound == bound


def test_estimates_of_the_compiler_count_where_there_are_any():
    estimated = kernel(cycles=1_500_000, moved=10**12)
    custom = kernel(kind="call tpu_custom_call", moved=int(0.8 * 819e9))
    timed = time_kernels([estimated, custom, kernel(moved=10**12)], V5E)
    assert [(t.seconds, t.bound) for t in timed] == [
        (pytest.approx(1e-3), "cycles"),
        (pytest.approx(1), "memory"),
    ]


def test_without_estimates_a_tpu_is_timed_like_a_gpu():
    (timed,) = time_kernels([kernel(flops=int(0.68 * TPU7X.flops))], TPU7X)
    assert (timed.seconds, timed.bound) == (pytest.approx(1), "compute")


def test_alike_kernels_of_all_blocks_are_one_and_the_longest_is_first():
    blocks = [kernel(layer=f"T/encoderblock_{i}/MlpBlock_0/tanh", moved=10**9) for i in range(12)]
    head = kernel(layer="head/dot", moved=10**10)
    other = kernel(layer="T/encoderblock_0/MlpBlock_0/tanh", moved=10**6)
    merged = merge_alike(time_kernels([other, *blocks, head], H200))
    assert [(t.kernel.layer, t.kernel.count) for t in merged] == [
        ("T/encoderblock_*/MlpBlock_0/tanh", 12),
        ("head/dot", 1),
        ("T/encoderblock_*/MlpBlock_0/tanh", 1),
    ]


# Two kernels of a millisecond each, one of them while 0.25 ms of transfers run, and half a
# millisecond of transfers at the end, when no kernel is left.
KB = int(0.8 * 4.8e9) // 2 // 4  # float32 values that are read and written in a millisecond
LINK = int(0.8 * 450e9 * 1e-3) // 4  # float32 values that are sent in a millisecond
SCHEDULE = f"""
HloModule schedule, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[{KB}], y: f32[{LINK // 4}], z: f32[{LINK // 2}]) -> f32[{LINK // 2}] {{
  %x = f32[{KB}]{{0}} parameter(0)
  %y = f32[{LINK // 4}]{{0}} parameter(1)
  %z = f32[{LINK // 2}]{{0}} parameter(2)
  %start = f32[{LINK // 4}]{{0}} all-reduce-start(%y), channel_id=1, replica_groups={{{{0,1}}}}, \
to_apply=%add
  %one = f32[{KB}]{{0}} negate(%x)
  %done = f32[{LINK // 4}]{{0}} all-reduce-done(%start)
  %two = f32[{KB}]{{0}} negate(%one)
  ROOT %last = f32[{LINK // 2}]{{0}} all-reduce(%z), channel_id=2, replica_groups={{{{0,1}}}}, \
to_apply=%add
}}
"""


def test_transfers_are_waited_for_where_no_kernel_runs_meanwhile():
    program = Program(SCHEDULE)
    transfers = program.transfers({"data": 2})
    # Two devices exchange as many bytes as they sum.
    assert [t.bytes for t in transfers.values()] == [4 * (LINK // 4), 4 * (LINK // 2)]
    sent, waited = find_waits(program, H200, transfers)
    assert sent == pytest.approx(0.75e-3)
    assert waited == pytest.approx(0.5e-3)


def test_a_transfer_that_is_needed_at_once_is_waited_for():
    move = f"  %one = f32[{KB}]{{0}} negate(%x)\n"
    program = Program(SCHEDULE.replace(move, "").replace("negate(%one)", "negate(%x)"))
    sent, waited = find_waits(program, H200, program.transfers({"data": 2}))
    assert waited == pytest.approx(sent) == pytest.approx(0.75e-3)


def test_between_hosts_the_network_is_slower():
    program = Program(SCHEDULE)
    near, _ = find_waits(program, H200, program.transfers({"data": 2}))
    transfers = program.transfers({"data": 2}, [0, 1])
    far, waited = find_waits(program, H200, transfers)
    assert far == pytest.approx(450 / 50 * near)
    # The first kernel runs meanwhile.
    assert waited == pytest.approx(far - 1e-3)
    assert sum(transfer_seconds(t, H200) for t in transfers.values()) == pytest.approx(far)


def test_a_kernel_of_pallas_takes_what_it_says():
    text = """
HloModule pallas

ENTRY %main (q: bf16[2,200,128]) -> bf16[2,200,128] {
  %q = bf16[2,200,128]{2,1,0} parameter(0)
  ROOT %out = bf16[2,200,128]{2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call",\
 backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"1000000000",\
"transcendentals":"240000000","bytes_accessed":"7"}}}
}
"""
    (kernel,) = list_kernels(Program(text))
    assert (kernel.flops, kernel.exponentials) == (10**9, 240_000_000)
    assert kernel.bytes == 4 * 2 * 200 * 128 * BF16
    (timed,) = time_kernels([kernel], V5E)
    assert (timed.seconds, timed.bound) == (pytest.approx(1e-3), "vectors")
