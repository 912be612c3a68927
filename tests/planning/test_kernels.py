# SPDX-License-Identifier: Apache-2.0
"""Kernels of compiled programs, and the time that they should take."""

from pathlib import Path

import pytest

from vit_jax.planning.hlo import Program
from vit_jax.planning.kernels import Kernel, list_kernels, merge_alike, time_kernels
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
