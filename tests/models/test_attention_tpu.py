# SPDX-License-Identifier: Apache-2.0
"""The kernel for TPUs, emulated on a CPU, beside the formula in float64."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.models.random_params import random_params
from tests.models.test_fused_attention import TINY, outputs
from tests.tiny import PACKED, tiny_config
from vit_jax.config.load import override_config
from vit_jax.config.reduced import reduce_for_planning
from vit_jax.models import attention, attention_tpu
from vit_jax.models.attention_tpu import divide_work, fits_vmem, group_heads, tpu_attention
from vit_jax.models.block_config import unconstrained
from vit_jax.models.flops import count_flops
from vit_jax.models.patches import Segments
from vit_jax.models.variants import make_vit
from vit_jax.parallel.mesh import make_mesh
from vit_jax.parallel.sharding import Placement
from vit_jax.planning.plan import make_plan
from vit_jax.planning.topologies import parse_topology

BATCH = "data", "fsdp"  # axes of the mesh


def formula(q, k, v, gradient, length, ids=None):
    """Attention and the gradients of queries, keys and values, in float64."""
    q, k, v, gradient = (np.asarray(x, np.float64) for x in (q, k, v, gradient))
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores[..., length or q.shape[1] :] = -np.inf
    if ids is not None:
        scores[np.broadcast_to((ids[:, None] != ids[..., None])[:, None], scores.shape)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    d_weights = np.einsum("bqhd,bkhd->bhqk", gradient, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    return (
        out,
        np.einsum("bhqk,bkhd->bqhd", d_scores, k),
        np.einsum("bhqk,bqhd->bkhd", d_scores, q),
        np.einsum("bhqk,bqhd->bkhd", weights, gradient),
    )


def draw(shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]


@functools.partial(jax.jit, static_argnames="length")
def emulate(q, k, v, gradient, length=None, ids=None):
    attend = functools.partial(tpu_attention, ids=ids, length=length, interpret=True)
    out, backward = jax.vjp(attend, q, k, v)
    return out, *backward(gradient)


def draw_ids(tokens):
    """A row of three images and padding, and a row of one image and padding."""
    parts = np.arange(tokens) * 8 // tokens
    return np.stack([(parts // 2 + 1) % 4, parts < 5]).astype(np.int32)


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "length", "dtype", "packed"),
    [
        (197, 2, 64, None, jnp.bfloat16, False),  # two heads in a row of registers
        (257, 1, 72, None, jnp.float32, False),
        (20, 3, 80, 13, jnp.float32, False),  # heads that cross rows; masked tokens
        (17, 6, 64, None, jnp.float32, False),  # three groups of heads
        (12, 1, 128, 11, jnp.bfloat16, False),
        (17, 6, 64, None, jnp.float32, True),
        (40, 2, 64, None, jnp.bfloat16, True),
    ],
)
def test_attention_and_gradients_are_those_of_the_formula(
    tokens, heads, head_dim, length, dtype, packed
):
    arrays = draw((2, tokens, heads, head_dim), dtype)
    if length is not None:  # What comes behind is cut off, so it has no gradient.
        arrays[3] = arrays[3].at[:, length:].set(0)
    exact = 2e-5 if dtype == jnp.float32 else 2e-2
    ids = draw_ids(tokens) if packed else None
    results = emulate(*arrays, length=length, ids=ids)
    for got, want in zip(results, formula(*arrays, length, ids), strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=exact, atol=exact)


@pytest.mark.parametrize("packed", [False, True])
def test_what_does_not_fit_vmem_at_once_is_split(packed, monkeypatch):
    arrays = draw((2, 16, 6, 64))
    ids = draw_ids(16) if packed else None
    want = formula(*arrays, None, ids)
    # Room for one group of two heads, of three, and for the scores of one head.
    room = attention_tpu._score_bytes(16, 16) + packed * attention_tpu._mask_bytes(16, 16)
    monkeypatch.setattr(attention_tpu, "VMEM_BYTES", room + 8 * 2 * 16 * 128 * 4)
    assert fits_vmem(16, 6, 64, 4, rows=packed)
    emulated = jax.jit(emulate.__wrapped__)(*arrays, ids=ids)
    for got, exact in zip(emulated, want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "length", "groups", "last"),
    [
        (512, 4, 64, None, 2, 0),
        (300, 2, 72, 290, 1, 44),  # heads that cross rows, and a last block of fewer queries
        (257, 2, 64, None, 1, 129),  # no last block of one query
    ],
)
def test_queries_of_long_sequences_are_taken_in_blocks(
    tokens, heads, head_dim, length, groups, last, packed, monkeypatch
):
    arrays = draw((2, tokens, heads, head_dim))
    if length is not None:
        arrays[3] = arrays[3].at[:, length:].set(0)
    ids = draw_ids(tokens) if packed else None
    # Room for the groups, and for the scores of 128 queries and of those that remain.
    channels = heads * head_dim // groups
    room = groups * 7 * attention_tpu._block_bytes(tokens, channels, 4)
    room += sum(attention_tpu._score_bytes(tokens, queries) for queries in (128, last))
    room += attention_tpu._sum_bytes(tokens, channels)
    room += packed * attention_tpu._mask_bytes(tokens, 128)
    monkeypatch.setattr(attention_tpu, "VMEM_BYTES", room)
    divided = divide_work(tokens, heads, head_dim, 4, rows=packed, backward=True)
    assert (divided.queries, divided.last, divided.groups) == (128, last, groups)
    results = jax.jit(emulate.__wrapped__, static_argnames="length")(
        *arrays, length=length, ids=ids
    )
    for got, want in zip(results, formula(*arrays, length, ids), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_heads_are_computed_in_whole_rows_of_registers():
    sizes = [(12, 64), (6, 64), (3, 64), (16, 80), (16, 72), (16, 88), (8, 128), (6, 96)]
    assert [group_heads(*size) for size in sizes] == [4, 2, 3, 8, 16, 16, 4, 6]


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "fits"),
    [
        (197, 12, 64, True),
        (577, 16, 64, True),
        (257, 16, 88, True),
        (1025, 16, 64, True),
        (2500, 16, 64, False),
    ],
)
def test_long_sequences_do_not_fit(tokens, heads, head_dim, fits):
    assert fits_vmem(tokens, heads, head_dim, 2) == fits


@pytest.mark.parametrize("packed", [False, True])
def test_what_does_not_fit_is_computed_in_memory(packed, monkeypatch):
    monkeypatch.setattr(attention_tpu, "VMEM_BYTES", 0)
    arrays = draw((2, 20, 4, 64))
    segments = Segments(draw_ids(20), 3) if packed else None

    @jax.jit
    def attend(q, k, v, gradient):
        attend = functools.partial(
            attention.pallas_attention, constrain=unconstrained, segments=segments
        )
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(gradient)

    for got, want in zip(
        attend(*arrays), formula(*arrays, None, segments and segments.ids), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_each_device_computes_its_images_and_heads_without_a_transfer(packed, monkeypatch):
    emulated = functools.partial(tpu_attention, interpret=True)
    monkeypatch.setattr(attention_tpu, "tpu_attention", emulated)
    place = Placement(make_mesh(data=2, fsdp=2, tensor=2))
    sharding = NamedSharding(place.mesh, PartitionSpec(BATCH, None, "tensor", None))
    arrays = draw((4, 9, 4, 64))
    ids = np.tile(draw_ids(9), (2, 1)) if packed else None
    sharded = [jax.device_put(x, sharding) for x in arrays]
    if packed:
        sharded.append(jax.device_put(ids, NamedSharding(place.mesh, PartitionSpec(BATCH))))

    def attend(q, k, v, gradient, ids=None):
        segments = None if ids is None else Segments(ids, 3)
        attend = functools.partial(attention.pallas_attention, constrain=place, segments=segments)
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(gradient)

    compiled = jax.jit(attend).lower(*sharded).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "all-reduce", "permute"))
    for got, want in zip(compiled(*sharded), formula(*arrays, None, ids), strict=True):
        assert got.sharding.spec[:3] == (BATCH, None, "tensor")
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    # A model is initialised from one image.
    one = jax.eval_shape(attend, *(x[:1] for x in arrays), ids if ids is None else ids[:1])
    assert [x.shape for x in one] == [(1, 9, 4, 64)] * 4


def test_operations_are_counted_on_all_devices():
    place = Placement(make_mesh(data=2, fsdp=2, tensor=2))
    arrays = draw((4, 9, 4, 64))

    def attend(q, k, v, gradient):
        attend = functools.partial(attention.pallas_attention, constrain=place)
        return jax.vjp(attend, q, k, v)[1](gradient)

    # Forward and backward have 7 products of 16 rows, 128 keys and, for two heads of 64 channels,
    # 128 channels each.
    flops = 7 * 2 * 4 * 16 * 128 * (4 * 128)
    assert count_flops(jax.make_jaxpr(attend)(*arrays)) == flops
    assert count_flops(jax.make_jaxpr(emulate.__wrapped__)(*arrays)) == flops


@pytest.mark.parametrize(
    "options",
    [
        {"rope_theta": 100.0, "qk_norm": True, "classifier": "map", "num_registers": 2},
        {"num_layers": 2, "scan": True, "remat": "dots", "patch_dropout_rate": 0.5},
    ],
    ids=str,
)
def test_a_model_gives_what_it_gives_with_attention_in_memory(options, monkeypatch):
    shapes = []

    def emulated(query, key, value, constrain, segments):
        shapes.append(query.shape)
        return tpu_attention(query, key, value, segments and segments.ids, interpret=True)

    monkeypatch.setattr(attention, "pallas_attention", emulated)
    make = functools.partial(make_vit, num_heads=4, **(TINY | options))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    kernel, plain = make(attention="pallas"), make(attention="xla")
    params = random_params(plain, images, train=False)
    want = outputs(plain, params, images)
    assert not shapes
    got = outputs(kernel, params, images)
    assert shapes
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("packed", [False, True])
def test_a_program_for_tpus_gathers_no_queries_keys_or_values(packed):
    sizes = {"hidden_size": 128, "mlp_dim": 256, "num_heads": 4, "patch_size": 4, "num_layers": 1}
    config = tiny_config(
        "nowhere",
        **{f"model__{key}": value for key, value in sizes.items()},
        precision="bfloat16",
        data__batch_size=64,
        mesh={"data": 4, "fsdp": 2, "tensor": 2},
    )
    transfers = {}
    for kind in ("xla", "fused"):
        changes = {"model.attention": kind} | (PACKED if packed else {})
        changed = override_config(config, changes).to_dict()
        reduced = reduce_for_planning(changed, num_classes=16, image_size=None if packed else 32)
        plan = make_plan(reduced, parse_topology("v5e:4x4"), cache=None)
        kinds = [kernel["kind"] for kernel in plan["kernels"]]
        assert ("call tpu_custom_call" in kinds) == (kind == "fused")
        has_scores = any("bhqk" in kernel["layer"] for kernel in plan["kernels"])
        assert has_scores == (kind == "xla")
        transfers[kind] = {(c["kind"], tuple(c["axes"])): c["bytes"] for c in plan["collectives"]}
    queries = 64 // 8 * 65 * 128 // 2 * 2  # bytes of one device's part
    for key, sent in transfers["fused"].items():
        assert sent - transfers["xla"].get(key, 0) < queries, key
