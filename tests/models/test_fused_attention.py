# SPDX-License-Identifier: Apache-2.0
"""Attention in one kernel: where it is taken, and that it gives what attention in memory gives.

On a CPU the formula of JAX takes the place of the kernel, on the same padded tokens.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.random_params import random_params
from vit_jax.config.build import _fit_to_mesh
from vit_jax.models import attention
from vit_jax.models.attention import ATTENTION_WEIGHTS, choose_attention
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.variants import make_text_transformer, make_vit
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

TINY = {"num_classes": 5, "patch_size": 4, "hidden_size": 32, "num_layers": 1, "mlp_dim": 32}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The shapes of the queries that the kernel got."""
    shapes = []
    original = attention.fused_attention

    def formula(query, key, value, **options):
        shapes.append(query.shape)
        return original(query, key, value, **options, implementation="xla")

    monkeypatch.setattr(attention, "fused_attention", formula)
    return shapes


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params, images):
    """Logits in training, their gradients, and logits in evaluation."""

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        logits, _ = model.apply({"params": params}, images, train=True, rngs=rngs)
        return (logits**2).sum(), logits

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    evaluated, _ = model.apply({"params": params}, images, train=False)
    return {"train": logits, "eval": evaluated} | flatten(gradients)


@pytest.mark.parametrize(
    ("options", "padded"),
    [
        ({"num_registers": 1}, 12),  # 11 tokens
        ({"classifier": "gap", "num_registers": 7}, 16),  # 16 tokens: no padding
        ({"rope_theta": 100.0, "qk_norm": True, "classifier": "map"}, 10),
        ({"rope_theta": 100.0, "patch_dropout_rate": 0.5, "dropout_rate": 0.2}, 6),
        ({"num_layers": 2, "scan": True, "remat": "dots", "distillation_token": True}, 12),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_attention_in_memory(options, padded, calls):
    make = functools.partial(make_vit, num_heads=4, **(TINY | options))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    fused, plain = make(attention="fused"), make(attention="xla")
    params = random_params(plain, images, train=False)
    want = outputs(plain, params, images)
    assert not calls
    got = outputs(fused, params, images)
    assert (2, padded, 4, 8) in calls
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("causal", [False, True])
def test_texts_are_encoded_as_by_attention_in_memory(causal, calls):
    sizes = {"vocab_size": 9, "context_length": 5, "num_classes": 4, "num_heads": 4, "scan": True}
    options = {k: v for k, v in TINY.items() if k in ("hidden_size", "num_layers", "mlp_dim")}
    make = functools.partial(make_text_transformer, causal=causal, **sizes, **options)
    tokens = np.arange(10).reshape(2, 5) % 9
    params = random_params(make(attention="xla"), tokens, train=False)
    want, got = (outputs(make(attention=a), params, tokens) for a in ("xla", "fused"))
    assert (2, 6, 4, 8) in calls  # An odd number of tokens is padded.
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_heads_that_no_kernel_takes_are_computed_in_memory(calls):
    model = make_vit(num_heads=8, attention="fused", **TINY)  # 4 channels a head
    images = np.zeros((1, 12, 12, 3), np.float32)
    jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert not calls


def test_weights_can_be_asked_for(calls):
    model = make_vit(num_heads=4, attention="fused", **TINY)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 12, 12, 3)).astype(np.float32)
    params = random_params(model, images, train=False)
    calls.clear()
    _, seen = model.apply({"params": params}, images, train=False, mutable=["intermediates"])
    weights = [v for k, v in flatten(seen["intermediates"]).items() if ATTENTION_WEIGHTS in k]
    assert [w.shape for w in weights] == [(1, 4, 10, 10)]
    assert not calls


def gpu(capability="9.0"):
    return types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA Test", compute_capability=capability
    )


CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")


def choose(device=None, *, hidden_size=768, num_tokens=197, head_shards=1, **options):
    options = {"num_heads": 12, "mlp_dim": 8, "dtype": jnp.bfloat16} | options
    return choose_attention(
        BlockConfig(**options), device or gpu(), hidden_size, num_tokens, head_shards=head_shards
    )


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, "fused"),
        ({"attention": "fused"}, "fused"),
        ({"attention": "xla"}, "xla"),
        ({"device": gpu("8.0")}, "fused"),
        ({"device": gpu("7.5")}, "xla"),
        ({"device": CPU}, "xla"),
        ({"device": TPU}, "pallas"),
        ({"device": TPU, "attention": "fused"}, "pallas"),
        ({"device": TPU, "attention": "pallas"}, "pallas"),
        ({"device": TPU, "num_tokens": 50}, "xla"),
        ({"device": TPU, "num_tokens": 1025}, "pallas"),
        ({"device": TPU, "num_tokens": 2500}, "xla"),  # scores do not fit into VMEM
        ({"device": TPU, "num_tokens": 1025, "head_shards": 2}, "pallas"),
        ({"device": TPU, "num_tokens": 1025, "head_shards": 4}, "xla"),  # three heads a device
        ({"device": TPU, "causal": True}, "xla"),  # its kernel has no causal mask
        ({"causal": True}, "fused"),
        ({"device": TPU, "dtype": jnp.float32}, "xla"),
        ({"device": TPU, "dtype": "float16"}, "xla"),
        ({"dtype": jnp.float32}, "xla"),
        ({"dtype": "float16"}, "fused"),
        ({"attention_dropout_rate": 0.1}, "xla"),
        ({"num_heads": 4}, "xla"),  # 192 channels
        ({"num_tokens": 63}, "xla"),
        ({"num_tokens": 64}, "fused"),
        ({"num_tokens": 5, "attention": "fused"}, "fused"),
    ],
    ids=str,
)
def test_auto_goes_by_device_dtype_and_sizes(changes, want):
    assert choose(**changes) == want


@pytest.mark.parametrize(
    ("changes", "need"),
    [
        ({"device": CPU}, r"a TPU, or an NVIDIA GPU from Ampere on \(this is cpu\)"),
        ({"device": TPU, "num_tokens": 2500}, r"fit into VMEM \(an image has 2500 tokens\)"),
        (
            {"device": TPU, "num_tokens": 1025, "head_shards": 4},
            r"fit into VMEM \(an image has 1025 tokens, and a device 3 heads\)",
        ),
        ({"device": TPU, "num_heads": 4}, "128 channels in a head"),
        ({"device": gpu("7.0")}, "from Ampere on"),
        ({"dtype": jnp.float32}, "precision='bfloat16'"),
        ({"attention_dropout_rate": 0.1}, "model.attention_dropout_rate=0"),
        ({"num_heads": 4}, "128 channels in a head .there are 192."),
    ],
    ids=str,
)
def test_fused_is_refused_where_it_can_not_be(changes, need):
    with pytest.raises(UserError, match=f"model.attention='fused' needs .*{need}") as error:
        choose(attention="fused", **changes)
    assert "set model.attention='auto'" in str(error.value)


@pytest.mark.parametrize(("tensor", "want"), [(1, "pallas"), (4, "xla")])
def test_the_heads_of_a_device_decide(tensor, want):
    model = make_vit(num_classes=5, variant="B/16", dtype=jnp.bfloat16)
    mesh: Any = types.SimpleNamespace(shape={"tensor": tensor}, devices=np.array([TPU] * tensor))
    fitted = _fit_to_mesh(model, (512, 512), mesh, key="model", sequence_parallel=False)
    assert fitted.attention == want


def test_the_kernel_for_tpus_is_refused_on_gpus():
    with pytest.raises(UserError, match=r"attention='pallas' needs a TPU \(this is NVIDIA Test\);"):
        choose(attention="pallas")
