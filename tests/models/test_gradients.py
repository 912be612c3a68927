# SPDX-License-Identifier: Apache-2.0
"""No speed is bought with a wrong result: gradients of every way to run a step, against float64.

The reference is the same ViT in plain products, which jax differentiates itself.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import tiny_config
from vit_jax.training.experiment import Experiment
from vit_jax.utils.tree import flatten

LAYERS, HEADS, PATCH, CLASSES = 2, 4, 4, 10
ONE = {"data": 1}

# What each changes in the config, and the mesh it runs on.
FLOAT32 = {
    "plain": ({}, ONE),
    "scan": ({"model__scan": True}, ONE),
    "dots": ({"model__remat": "dots"}, ONE),
    "full": ({"model__remat": "full"}, ONE),
    "save": ({"model__remat": "save:qkv,attn_out,mlp_hidden"}, ONE),
    "scan_full": ({"model__scan": True, "model__remat": "full"}, ONE),
    "accum_steps": ({"optimizer__accum_steps": 4}, ONE),
    "mesh": ({}, {"data": 2, "fsdp": 2, "tensor": 2}),
    "zero1_sequence": ({}, {"data": 4, "tensor": 2, "zero1": True, "sequence_parallel": True}),
}
# float32 rounds by 2^-24 at most, and some hundred operations stand between a parameter and its
# gradient, there and back. Were their errors independent they would add to 10 of these; 50 leave
# room for those of sums and for where an input is larger than what comes of it.
FLOAT32_ERROR = 50 * 2**-24
FLOAT8 = {
    "plain": ({}, ONE),
    "scan_full": ({"model__scan": True, "model__remat": "full"}, ONE),
    "mesh": ({}, {"data": 2, "fsdp": 2, "tensor": 2}),
}
# e4m3 rounds by 3 % on the average of squares, e5m2 by 5 %: each product adds 4 to 6 % across its
# result. 24 of them would be 25 % if all errors reached each gradient: a cosine of 0.97.
FLOAT8_COSINE = 0.97


def plain_loss(params, images, labels, dtype):
    """The loss of a ViT with a class token, in `dtype` but for norms, softmax and logits."""
    wide = jnp.promote_types(dtype, jnp.float32)
    images = (images.astype(wide) / 255 - 0.5) / 0.5

    def dense(layer, x, depth=1, dtype=dtype):
        kernel, bias = layer["kernel"].astype(dtype), layer["bias"].astype(dtype)
        return jnp.tensordot(x.astype(dtype), kernel, depth) + bias

    def norm(layer, x):
        x = x.astype(wide)
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return (x * layer["scale"].astype(wide) + layer["bias"].astype(wide)).astype(dtype)

    def attend(layer, x):
        query, key, value = (dense(layer[name], x) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query / query.shape[-1] ** 0.5, key)
        weights = jax.nn.softmax(scores.astype(wide)).astype(dtype)
        return dense(layer["out"], jnp.einsum("bhqk,bkhd->bqhd", weights, value), depth=2)

    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    x = dense(params["embedding"], x.swapaxes(2, 3), depth=3).reshape(batch, -1, 16)
    x = jnp.concatenate([jnp.tile(params["cls"].astype(dtype), (batch, 1, 1)), x], axis=1)
    encoder = params["Transformer"]
    x = x + encoder["posembed_input"]["pos_embedding"].astype(dtype)
    for i in range(LAYERS):
        block = encoder[f"encoderblock_{i}"]
        attention = block["MultiHeadDotProductAttention_0"]
        x = x + attend(attention, norm(block["LayerNorm_0"], x))
        y = dense(block["MlpBlock_0"]["Dense_0"], norm(block["LayerNorm_1"], x))
        x = x + dense(block["MlpBlock_0"]["Dense_1"], jax.nn.gelu(y, approximate=True))
    logits = dense(params["head"], norm(encoder["encoder_norm"], x)[:, 0], dtype=wide)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def stack_blocks(params):
    """The parameters as a scan has them."""
    encoder = dict(params["Transformer"])
    blocks = [encoder.pop(f"encoderblock_{i}") for i in range(LAYERS)]
    encoder["encoderblock"] = jax.tree.map(lambda *x: np.stack(x), *blocks)
    return {**params, "Transformer": encoder}


def unstack_blocks(params):
    encoder = dict(params["Transformer"])
    stacked = encoder.pop("encoderblock")
    for i in range(LAYERS):
        encoder[f"encoderblock_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
    return {**params, "Transformer": encoder}


def build(data_dir, mesh=ONE, **changes):
    own = {"model__patch_size": PATCH, "model__num_layers": LAYERS}
    changes = {"data__preprocess": "decode", "evals": {}} | own | changes
    # After one update the momentum is the gradient.
    optimizer = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "schedule": "constant"}
    config = tiny_config(data_dir, mesh=mesh, optimizer=optimizer, **changes)
    devices = jax.devices()[: 1 if mesh is ONE else 8]
    return Experiment.from_config(config, devices=devices)


@dataclasses.dataclass
class Reference:
    params: Any
    batch: Any
    loss: float
    grads: dict[str, np.ndarray]
    bfloat16_error: dict[str, float]


@pytest.fixture(scope="module")
def reference(data_dir):
    experiment = build(data_dir)
    rng = np.random.default_rng(0)
    # Away from zeros and ones, so that there is a gradient everywhere.
    params = jax.tree.map(
        lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32),
        experiment.initial_params(),
    )
    batch = jax.device_get(next(experiment.train_batches(0)))
    images, labels = batch["image"], batch["label"]
    gradients = jax.jit(jax.value_and_grad(plain_loss), static_argnums=3)
    half = flatten(jax.device_get(gradients(params, images, labels, jnp.bfloat16)[1]))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(np.float64), params)
        loss, grads = jax.device_get(gradients(exact, images, labels, jnp.float64))
    grads = flatten(grads)
    assert {x.dtype for x in grads.values()} == {np.dtype("float64")}
    return Reference(params, batch, float(loss), grads, errors(half, grads))


def take_step(reference, data_dir, changes, mesh):
    """The loss and the gradient of one training step, and the dtype of the momentum."""
    experiment = build(data_dir, mesh, **changes)
    scan = bool(changes.get("model__scan"))
    params = stack_blocks(reference.params) if scan else reference.params
    state = dataclasses.replace(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), experiment.abstract_state),
        params=jax.tree.map(np.array, params),
    )
    state = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), state, experiment.abstract_state
    )
    batch = next(experiment.train_batches(0))
    np.testing.assert_array_equal(batch["image"], reference.batch["image"])
    state, metrics = experiment.train_step(state, batch)
    opt_state: Any = state.opt_state
    (trace,) = (s.trace for s in opt_state if hasattr(s, "trace"))
    grads = jax.device_get(trace)
    grads = flatten(unstack_blocks(grads) if scan else grads)
    (dtype,) = {str(x.dtype) for x in grads.values()}
    return float(metrics["loss"]), grads, dtype


def errors(got, want):
    """The norm of the difference over that of the gradient, for each parameter."""
    assert got.keys() == want.keys()
    # The softmax does not see a bias of the keys: its gradient is none but rounding.
    size = {path: np.linalg.norm(want[path.replace("key/bias", "key/kernel")]) for path in want}
    return {
        path: float(np.linalg.norm(np.float64(got[path]) - want[path]) / size[path])
        for path in want
    }


@pytest.mark.parametrize("name", FLOAT32)
def test_every_way_to_run_a_step_in_float32_gives_the_gradient(name, reference, data_dir):
    loss, grads, _ = take_step(reference, data_dir, *FLOAT32[name])
    assert loss == pytest.approx(reference.loss, rel=1e-6)
    found = errors(grads, reference.grads)
    assert {path: e for path, e in found.items() if e > FLOAT32_ERROR} == {}


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16_moments"])
def test_bfloat16_is_as_near_as_a_plain_step_in_it(name, reference, data_dir):
    loss, grads, dtype = take_step(reference, data_dir, {"precision": name}, ONE)
    assert dtype == ("float32" if name == "bfloat16" else "bfloat16")
    assert loss == pytest.approx(reference.loss, rel=2**-8)
    found = errors(grads, reference.grads)
    # The momentum is rounded once more, by 2^-9 at most.
    allowed = {path: 2 * e + 2**-9 for path, e in reference.bfloat16_error.items()}
    assert {path: e for path, e in found.items() if e > allowed[path]} == {}


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_points_where_the_gradient_does(name, reference, data_dir):
    changes, mesh = FLOAT8[name]
    loss, grads, _ = take_step(reference, data_dir, {"precision": "float8", **changes}, mesh)
    got, want = (
        np.concatenate([np.float64(tree[path]).ravel() for path in sorted(reference.grads)])
        for tree in (grads, reference.grads)
    )
    cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
    assert cosine > FLOAT8_COSINE
    assert np.linalg.norm(got) == pytest.approx(np.linalg.norm(want), rel=0.1)
    assert loss == pytest.approx(reference.loss, rel=0.05)
    # It is no other computation under that name.
    assert max(errors(grads, reference.grads).values()) > 2 * max(reference.bfloat16_error.values())
