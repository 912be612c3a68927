# SPDX-License-Identifier: Apache-2.0
"""Attention of images as one kernel for TPUs: the scores of a head stay in its VMEM.

An image of a ViT has a few hundred tokens, so all scores of a head fit into VMEM. Of up to some two
thousand tokens those of a block of queries do, with all keys: the running maxima and sums of
FlashAttention (arXiv:2205.14135) are not needed. The backward pass computes the scores again. The
arithmetic is that of arXiv:1706.03762, section 3.2: products with float32 sums, and a float32
softmax whose weights are rounded to the dtype of the values.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Channels in a row of the registers of a TPU.
LANES = 128
# Of the 16 MiB of VMEM that XLA gives to a kernel.
VMEM_BYTES = 15 * 2**20
# Heads that a kernel computes side by side, where there is room for their scores.
HEADS_AT_ONCE = 4
_NN = (((1,), (0,)), ((), ()))  # a @ b
_NT = (((1,), (1,)), ((), ()))  # a @ b.T
_TN = (((0,), (0,)), ((), ()))  # a.T @ b


def tpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array | None = None,
    *,
    length: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention whose weights never leave VMEM, with its gradient.

    Args:
      query, key, value: bfloat16 or float32 `[batch, tokens, heads, head_dim]`.
      ids: int32 `[batch, tokens]`, what each token is part of: it attends to tokens of the same
        number alone. None for one image.
      length: number of tokens that are attended to, the first ones; None for all.
      interpret: whether the kernel is emulated, as a CPU does it in tests.

    Returns:
      `[batch, tokens, heads, head_dim]` in the same dtype.
    """
    # As `[batch, tokens, channels]`, so that what is saved for the backward pass fills whole rows.
    shape = query.shape
    flat = (x.reshape(*shape[:2], -1) for x in (query, key, value))
    out: Any = _attention(*flat, ids, shape[3], length or shape[1], interpret)
    return out.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(
    query: Any, key: Any, value: Any, ids: Any, head_dim: int, length: int, interpret: bool
) -> jax.Array:
    return _call((query, key, value), ids, head_dim, length, interpret)[0]


def _save(query: Any, key: Any, value: Any, ids: Any, *static: Any) -> tuple[Any, Any]:
    out = _call((query, key, value), ids, *static)[0]
    return out, (query, key, value, ids)


def _differentiate(
    head_dim: int, length: int, interpret: bool, saved: Any, gradient: Any
) -> tuple[Any, ...]:
    *arrays, ids = saved
    # Integers have no gradient.
    return *_call((*arrays, gradient), ids, head_dim, length, interpret), None


_attention.defvjp(_save, _differentiate)


def _forward_heads(
    heads: Sequence["_Head"], same: jax.Array | None, *, scale: float, length: int
) -> list[Any]:
    """Attention of some heads: for each a tuple of float32 `[queries, window]`.

    All heads take each step together, so that one can use the units that another waits for. `same`
    is what `_mask` takes.
    """
    scores = [_dot(h.arrays[0], h.only(h.arrays[1]), _NT) * scale for h in heads]
    weights = [_softmax(_mask(s, same, length, 1), 1) for s in scores]
    return [
        (_dot(w.astype(h.arrays[2].dtype), h.only(h.arrays[2]), _NN),)
        for h, w in zip(heads, weights, strict=True)
    ]


def _backward_heads(
    heads: Sequence["_Head"], same: jax.Array | None, *, scale: float, length: int
) -> list[Any]:
    """Gradients of query, key and value of some heads, each float32 `[tokens, window]`.

    Those of keys and values are what these queries add to them.

    Scores are `[keys, queries]`, so that sums over keys add rows rather than lanes, and only one of
    the five products has a transposed left operand.
    """
    dtype = heads[0].arrays[0].dtype
    queries, keys, values, gradients = zip(*(h.arrays for h in heads), strict=True)
    keys = [h.only(key) for h, key in zip(heads, keys, strict=True)]
    scores = [_dot(key, query, _NT) * scale for key, query in zip(keys, queries, strict=True)]
    weights = [_softmax(_mask(s, same, length, 0), 0) for s in scores]
    d_weights = [
        _dot(h.only(value), gradient, _NT)
        for h, value, gradient in zip(heads, values, gradients, strict=True)
    ]
    d_values = [
        _dot(w.astype(dtype), h.only(gradient), _NN)
        for h, w, gradient in zip(heads, weights, gradients, strict=True)
    ]
    d_scores = [
        (w * (dw - (w * dw).sum(axis=0, keepdims=True)) * scale).astype(dtype)
        for w, dw in zip(weights, d_weights, strict=True)
    ]
    d_keys = [
        _dot(ds, h.only(query), _NN) for h, ds, query in zip(heads, d_scores, queries, strict=True)
    ]
    d_queries = [_dot(ds, key, _TN) for ds, key in zip(d_scores, keys, strict=True)]
    return list(zip(d_queries, d_keys, d_values, strict=True))


def _dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _mask(scores: jax.Array, same: jax.Array | None, length: int, axis: int) -> jax.Array:
    """Scores of the keys, which are along `axis`, from `length` on become -inf.

    So do those that are not `same`, bool in the shape of the scores.
    """
    if same is not None:
        scores = jnp.where(same, scores, -jnp.inf)
    if length == scores.shape[axis]:
        return scores
    position = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    return jnp.where(position < length, scores, -jnp.inf)


def _softmax(scores: jax.Array, axis: int) -> jax.Array:
    weights = jnp.exp(scores - scores.max(axis=axis, keepdims=True))
    return weights * (1 / weights.sum(axis=axis, keepdims=True))


def group_heads(num_heads: int, head_dim: int, *, at_most: int = HEADS_AT_ONCE) -> int:
    """Number of heads that fill whole rows of registers; all of them if these have no such groups.

    With 64 channels two heads share a row. Of small groups, those of up to `at_most` heads are one.
    """
    together = LANES // math.gcd(head_dim, LANES)
    sizes = [together * n for n in range(1, HEADS_AT_ONCE + 1) if num_heads % (together * n) == 0]
    return max((size for size in sizes if size <= at_most), default=min([*sizes, num_heads]))


def fits_vmem(
    num_tokens: int, num_heads: int, head_dim: int, itemsize: int, *, rows: bool = False
) -> bool:
    """Whether the kernels have room for a group of heads, and the scores of some queries of one.

    With `rows` there is a mask too, of the images of a row.
    """
    return (
        divide_work(num_tokens, num_heads, head_dim, itemsize, rows=rows, backward=True) is not None
    )


@dataclasses.dataclass(frozen=True)
class Division:
    """How a kernel divides its work.

    Attributes:
      queries: number of them whose scores are computed at a time: all, or some in a loop.
      last: number of those that the loop leaves.
      group: number of heads that fill whole rows of registers, whose channels are loaded together.
      at_once: number of heads of a group that are computed side by side.
      groups: number of groups that VMEM has at a time.
    """

    queries: int
    last: int
    group: int
    at_once: int
    groups: int


def divide_work(
    num_tokens: int, num_heads: int, head_dim: int, itemsize: int, *, rows: bool, backward: bool
) -> Division | None:
    """Chooses how a kernel divides its work; None if VMEM has no room for the least of it.

    Args:
      num_tokens, num_heads, head_dim: of an image or a row.
      itemsize: bytes of a number in the arrays.
      rows: whether there is a mask, of the images of a row.
      backward: whether it computes gradients.
    """
    whole = num_tokens, group_heads(num_heads, head_dim)
    # Cycles are about the same for all numbers of queries; few of them leave room for tokens.
    few = LANES, group_heads(num_heads, head_dim, at_most=1)
    for queries, group in (whole, few) if num_tokens > LANES else (whole,):
        scores = _score_bytes(num_tokens, queries)
        last = num_tokens % queries
        if last == 1:  # libtpu 0.0.42 can't compile the products of a single one.
            last += queries
        # The memory of heads is used again, but what is behind the loop has some apart.
        room = VMEM_BYTES - scores - _score_bytes(num_tokens, last)
        room -= rows * _mask_bytes(num_tokens, queries)
        if backward and queries < num_tokens:
            room -= _sum_bytes(num_tokens, group * head_dim)
        arrays = (7 if backward else 4) * _block_bytes(num_tokens, group * head_dim, itemsize)
        if room < arrays:
            continue
        at_once = min(group, HEADS_AT_ONCE, max(1, VMEM_BYTES * 3 // 4 // scores))
        # As many groups as there is room for, so that they are fetched in few blocks.
        most, all_groups = room // arrays, num_heads // group
        groups = max(n for n in range(1, all_groups + 1) if all_groups % n == 0 and n <= most)
        return Division(queries, last, group, at_once, groups)
    return None


def _score_bytes(num_tokens: int, queries: int) -> int:
    """Size of the scores of heads in the backward pass, and of what is computed from them."""
    arrays = 7 if queries == num_tokens else 5  # that libtpu 0.0.42 holds at a time
    return arrays * 4 * _round_up(num_tokens, 8) * _round_up(queries, LANES)


def _mask_bytes(num_tokens: int, queries: int) -> int:
    """Size of the mask of a row, and twice that of the numbers that it is computed from."""
    rows, lanes = _round_up(num_tokens, 8), _round_up(num_tokens, LANES)
    return 4 * (rows * _round_up(queries, LANES) + 2 * (rows * LANES + 8 * lanes))


def _sum_bytes(num_tokens: int, channels: int) -> int:
    """Size of the gradients of keys and values of a group, which are summed over the queries."""
    return 2 * 4 * _round_up(num_tokens, 8) * _round_up(channels, LANES)


def _block_bytes(num_tokens: int, channels: int, itemsize: int) -> int:
    """Size of a group of heads of one array: twice, since the next block is fetched meanwhile."""
    return 2 * _round_up(num_tokens, 16) * _round_up(channels, LANES) * itemsize


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _call(
    arrays: Sequence[jax.Array],
    ids: jax.Array | None,
    head_dim: int,
    length: int,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel on all heads of arrays `[batch, tokens, channels]`, and returns such.

    Queries, keys and values give the output; with its gradient, their gradients. `ids` are those of
    `tpu_attention`.
    """
    batch, tokens, width = arrays[0].shape
    num_heads, itemsize, backward = width // head_dim, arrays[0].dtype.itemsize, len(arrays) == 4
    kernel, num_results = (_backward_heads, 3) if backward else (_forward_heads, 1)
    # As a column and as a row, since a kernel would take long to transpose one of them.
    masks = () if ids is None else (ids[:, :, None], ids[:, None, :])
    division = divide_work(
        tokens, num_heads, head_dim, itemsize, rows=ids is not None, backward=backward
    )
    if division is None:
        raise ValueError(f"{tokens} tokens of {num_heads} x {head_dim} channels do not fit VMEM")
    queries, group = division.queries, division.group * head_dim
    # Of the arrays and the results, the first and the fourth have rows of queries.
    of_queries = 0, 3

    def body(*refs: Any) -> None:
        operands, refs = refs[: len(arrays)], refs[len(arrays) :]
        numbers, refs = refs[: len(masks)], refs[len(masks) :]
        results, sums = refs[:num_results], refs[num_results:]

        def some_queries(start: Any, first_query: Any, count: int) -> None:
            """Computes what queries of a group give, from channel `start` on."""
            rows = [pl.ds(first_query, count) if i in of_queries else slice(None) for i in range(4)]
            loaded = [ref[0, rows[i], pl.ds(start, group)] for i, ref in enumerate(operands)]
            same = None
            if numbers:
                column, row = numbers
                same = column[0] == row[0, :, rows[0]] if backward else column[0, rows[0]] == row[0]
            heads = _split_heads(loaded, head_dim)
            found: list[Any] = []
            for first in range(0, len(heads), division.at_once):
                some = heads[first : first + division.at_once]
                found += kernel(some, same, scale=1 / math.sqrt(head_dim), length=length)
            for i, values in enumerate(zip(*found, strict=True)):
                for tile, value in _join_heads(heads, values).items():
                    if sums and i not in of_queries:
                        sums[i - 1][:, pl.ds(tile, value.shape[1])] += value
                    else:
                        channels = pl.ds(start + tile, value.shape[1])
                        results[i][0, rows[i], channels] = value.astype(results[i].dtype)

        def one_group(index: Any, _: Any) -> None:
            start = pl.multiple_of(index * group, LANES) if division.groups > 1 else 0
            if queries == tokens:
                some_queries(start, 0, tokens)
                return
            for total in sums:
                total[...] = jnp.zeros(total.shape, total.dtype)

            def one_block(block: Any, _: Any) -> None:
                some_queries(start, pl.multiple_of(block * queries, LANES), queries)

            jax.lax.fori_loop(0, (tokens - division.last) // queries, one_block, None)
            if division.last:
                some_queries(start, tokens - division.last, division.last)
            for result, total in zip(results[1:], sums, strict=True):
                result[0, :, pl.ds(start, group)] = total[...].astype(result.dtype)

        if division.groups == 1:
            one_group(0, None)
        else:
            jax.lax.fori_loop(0, division.groups, one_group, None)

    block = (1, tokens, division.groups * group)
    scratch = [pltpu.VMEM((tokens, group), jnp.float32)] * 2
    spec = pl.BlockSpec(block, lambda image, part: (image, 0, part))
    of_image = [pl.BlockSpec((1, *x.shape[1:]), lambda image, part: (image, 0, 0)) for x in masks]
    return pl.pallas_call(
        body,
        grid=(batch, width // block[2]),
        in_specs=[spec] * len(arrays) + of_image,
        out_specs=[spec] * num_results,
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * num_results,
        scratch_shapes=scratch if backward and queries < tokens else [],
        # A chip of two cores gives half of the images to each.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=_estimate_cost(arrays[0], masks, head_dim, len(arrays), num_results),
        interpret=interpret,
        name=f"attention{kernel.__name__}",
    )(*arrays, *masks)


def _estimate_cost(
    array: jax.Array,
    masks: Sequence[jax.Array],
    head_dim: int,
    num_operands: int,
    num_results: int,
) -> pl.CostEstimate:
    """What a kernel costs, for XLA and for plans.

    Operations are those that the units for products spend time on: a head of 64 channels takes as
    long as one of 128, and keys fill rows of registers. The exponentials count once for each array
    of scores: in the backward pass also for their gradients, which take as long.
    """
    batch, tokens, channels = array.shape
    num_heads = channels // head_dim
    group = group_heads(num_heads, head_dim)
    width = sum(_round_up(end - start, LANES) for start, end in _windows(group, head_dim))
    scores = batch * _round_up(tokens, 8) * _round_up(tokens, LANES)
    # Scores and outputs; backward, the scores again and the gradients of q, k, v and scores.
    products, passes = (2, 1) if num_results == 1 else (5, 2)
    return pl.CostEstimate(
        flops=products * 2 * scores * width * (num_heads // group),
        transcendentals=passes * scores * num_heads,
        bytes_accessed=(num_operands + num_results) * array.size * array.dtype.itemsize
        + sum(x.size * x.dtype.itemsize for x in masks),
    )


@dataclasses.dataclass(frozen=True)
class _Head:
    """A head within the whole rows of registers that it touches, from channel `start` to `end`.

    There, the channels of other heads count as zeros: a product takes as long, and no channel has
    to be moved. `arrays` are the operands `[tokens, end - start]`; `first` is the position of the
    first channel of the head in them.
    """

    arrays: tuple[jax.Array, ...]
    start: int
    end: int
    first: int
    head_dim: int

    def only(self, x: jax.Array) -> jax.Array:
        """`x` `[tokens, end - start]` with zeros for the channels of other heads."""
        if x.shape[1] == self.head_dim:
            return x
        channel = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        inside = (channel >= self.first) & (channel < self.first + self.head_dim)
        return jnp.where(inside, x, jnp.zeros_like(x))


def _windows(num_heads: int, head_dim: int) -> list[tuple[int, int]]:
    """The first channel and the end of the whole rows of registers that each head touches."""
    width = num_heads * head_dim
    ends = [_round_up((head + 1) * head_dim, LANES) for head in range(num_heads)]
    starts = [head * head_dim // LANES * LANES for head in range(num_heads)]
    return [(start, min(end, width)) for start, end in zip(starts, ends, strict=True)]


def _split_heads(arrays: Sequence[jax.Array], head_dim: int) -> list[_Head]:
    """The heads of arrays `[tokens, heads * head_dim]`."""
    windows = _windows(arrays[0].shape[1] // head_dim, head_dim)
    return [
        _Head(tuple(x[:, a:b] for x in arrays), a, b, head * head_dim - a, head_dim)
        for head, (a, b) in enumerate(windows)
    ]


def _join_heads(heads: Sequence[_Head], values: Sequence[jax.Array]) -> dict[int, jax.Array]:
    """Adds `[tokens, window]` of heads: `[tokens, up to LANES]` by their first channel."""
    tiles: dict[int, jax.Array] = {}
    for head, value in zip(heads, values, strict=True):
        for tile in range(head.start, head.end, LANES):
            part = value[:, tile - head.start : min(tile + LANES, head.end) - head.start]
            tiles[tile] = tiles[tile] + part if tile in tiles else part
    return tiles
