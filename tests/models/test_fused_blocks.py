# SPDX-License-Identifier: Apache-2.0
"""Blocks in the form for NVIDIA GPUs compute what blocks of Flax's layers compute.

On a CPU JAX interprets the kernel of the norms' gradients.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.models.random_params import random_params
from vit_jax.models import attention, layer_norm
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.blocks import choose_blocks
from vit_jax.models.layer_norm import branch_gradients
from vit_jax.models.lora import Lora
from vit_jax.models.variants import make_vit
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

TINY = {"num_classes": 5, "patch_size": 4, "hidden_size": 24, "num_layers": 1, "mlp_dim": 32}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    interpreted = functools.partial(branch_gradients, interpret=True)
    monkeypatch.setattr(layer_norm, "branch_gradients", interpreted)
    formula = functools.partial(attention.fused_attention, implementation="xla")
    monkeypatch.setattr(attention, "fused_attention", formula)


def exact_gradients(x, scale, passed, normed, epsilon):
    """The gradients of a LayerNorm and of its input that is passed through, in float64."""
    x, scale, passed, normed = (np.asarray(a, np.float64) for a in (x, scale, passed, normed))
    centred = x - x.mean(1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(1, keepdims=True) + epsilon)
    unit, scaled = centred * inverse, normed * scale
    along = (scaled * unit).mean(1, keepdims=True)
    dx = passed + inverse * (scaled - scaled.mean(1, keepdims=True) - unit * along)
    return dx, np.stack([(normed * unit).sum(0), normed.sum(0)])


def make_gradients(rows, width, dtype=np.float32):
    rng = np.random.default_rng(0)
    x, passed, normed = (rng.normal(size=(rows, width)) for _ in range(3))
    # A mean that is large beside the deviations, as in channels of trained models.
    x = 30 + 2 * x
    return [jnp.asarray(a, dtype) for a in (x, passed, normed)], jnp.asarray(rng.normal(size=width))


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(1, 8, "float32"), (600, 24, "float32"), (17, 1280, "float32"), (5, 64, "bfloat16")],
)
def test_the_kernel_has_the_gradients_of_float64(rows, width, dtype):
    (x, passed, normed), scale = make_gradients(rows, width, dtype)
    got = branch_gradients(x, scale, passed, normed, epsilon=1e-6, interpret=True)
    want = exact_gradients(x, scale, passed, normed, 1e-6)
    assert got[0].dtype == x.dtype
    assert got[1].dtype == jnp.float32
    rounding = 2e-5 if dtype == "float32" else 1e-2
    for a, b in zip(got, want, strict=True):
        error = np.abs(np.asarray(a, np.float64) - b).max()
        assert error < rounding * np.abs(b).max()


def test_each_device_computes_the_gradients_of_its_rows():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    tokens, whole = (NamedSharding(mesh, PartitionSpec(spec)) for spec in (("data", "fsdp"), None))
    (x, passed, normed), scale = make_gradients(16, 24)
    compute = functools.partial(branch_gradients, epsilon=1e-6, interpret=True)
    compiled = jax.jit(compute, in_shardings=(tokens, whole, tokens, tokens)).lower(
        x, scale, passed, normed
    )
    program = compiled.compile()
    assert "all-gather" not in program.as_text()
    got = program(*jax.device_put((x, scale, passed, normed), (tokens, whole, tokens, tokens)))
    for a, b in zip(got, exact_gradients(x, scale, passed, normed, 1e-6), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


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
    "options",
    [
        {"attention": "xla", "attention_dropout_rate": 0.2},
        {"rope_theta": 100.0, "qk_norm": True, "classifier": "map", "layer_scale_init": 0.5},
        {"num_layers": 2, "scan": True, "remat": "dots", "stochastic_depth_rate": 0.2},
        {"dropout_rate": 0.2, "patch_dropout_rate": 0.5, "num_registers": 2, "remat": "full"},
        {"float8": True, "activation": "swiglu"},
        {"lora": Lora(rank=2)},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_layers_of_flax(options):
    options = TINY | {"num_heads": 3, "attention": "fused"} | options
    images = np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    fused, plain = make_vit(**options, blocks="fused"), make_vit(**options, blocks="xla")
    params = random_params(plain, images, train=False)
    shapes = jax.eval_shape(lambda: fused.init(jax.random.key(0), images, train=False)["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    want, got = outputs(plain, params, images), outputs(fused, params, images)
    tolerance = 0.1 if options.get("float8") else 1e-4
    for name, value in want.items():
        # The gradients of key biases are zero, but for rounding.
        scale = np.abs(value).max() + 0.01
        np.testing.assert_allclose(got[name], value, atol=tolerance * scale, err_msg=name)


def test_parameters_start_from_the_same_values():
    models = (make_vit(**TINY, num_heads=3, blocks=blocks) for blocks in ("fused", "xla"))
    images = np.zeros((1, 8, 8, 3), np.float32)
    fused, plain = (m.init(jax.random.key(0), images, train=False)["params"] for m in models)
    jax.tree.map(np.testing.assert_array_equal, fused, plain)


GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA Test", compute_capability="8.0")
OLD = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.mark.parametrize(
    ("blocks", "device", "sequence_parallel", "want"),
    [
        ("auto", GPU, False, "fused"),
        ("fused", GPU, False, "fused"),
        ("xla", GPU, False, "xla"),
        ("auto", GPU, True, "xla"),
        ("auto", OLD, False, "xla"),
        ("auto", CPU, False, "xla"),
    ],
    ids=str,
)
def test_auto_goes_by_device_and_mesh(blocks, device, sequence_parallel, want):
    config = BlockConfig(mlp_dim=8, blocks=blocks)
    assert choose_blocks(config, device, sequence_parallel=sequence_parallel) == want


@pytest.mark.parametrize(
    ("device", "sequence_parallel", "need"),
    [(OLD, False, "Ampere on .this is Tesla T4."), (GPU, True, "mesh.sequence_parallel=False")],
    ids=str,
)
def test_fused_is_refused_where_it_can_not_be(device, sequence_parallel, need):
    config = BlockConfig(mlp_dim=8, blocks="fused")
    with pytest.raises(UserError, match=f"model.blocks='fused' needs .*{need}.*'auto'"):
        choose_blocks(config, device, sequence_parallel=sequence_parallel)
