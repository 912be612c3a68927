# SPDX-License-Identifier: Apache-2.0
"""Meshes, the placement of parameters, and activations that stay where they are put."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from vit_jax.models.variants import make_vit
from vit_jax.objectives.supervised import make_supervised
from vit_jax.parallel.mesh import (
    batch_sharding,
    check_batch_size,
    make_mesh,
    process_shards,
    put_batch,
)
from vit_jax.parallel.sharding import constrain, infer_shardings, param_spec
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten


def test_minus_one_takes_the_devices_that_are_left():
    mesh = make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


def test_axes_are_auto_because_flax_linen_needs_it():
    assert set(make_mesh().axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "does not make 8 device"),
        ({"data": 2, "fsdp": 2}, "data=2 x fsdp=2 x tensor=1 does not make 8"),
        ({"data": -1, "fsdp": -1}, "mesh.fsdp=-1: only one axis can fill"),
        ({"tensor": 0}, "mesh.tensor=0: expected at least 1"),
    ],
)
def test_impossible_meshes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes)


def test_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(data=4, tensor=2)
    check_batch_size(12, mesh, key="data.batch_size")
    with pytest.raises(UserError, match=r"data.batch_size=10 is not divisible by 4"):
        check_batch_size(10, mesh, key="data.batch_size")


def test_batch_is_split_over_data_and_fsdp_and_copied_over_tensor():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    batch = put_batch({"image": np.arange(8.0).reshape(8, 1)}, mesh)
    assert process_shards(mesh) == ((0, 1, 2, 3), 4)
    rows = {tuple(np.ravel(s.data).tolist()) for s in batch["image"].addressable_shards}
    assert rows == {(0, 1), (2, 3), (4, 5), (6, 7)}


BLOCK = "Transformer/encoderblock_0"


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (
            f"{BLOCK}/MultiHeadDotProductAttention_0/query/kernel",
            (64, 4, 16),
            ("fsdp", "tensor", None),
        ),
        (f"{BLOCK}/MultiHeadDotProductAttention_0/query/bias", (4, 16), ("tensor", None)),
        (
            f"{BLOCK}/MultiHeadDotProductAttention_0/out/kernel",
            (4, 16, 64),
            ("tensor", None, "fsdp"),
        ),
        (f"{BLOCK}/MlpBlock_0/Dense_0/kernel", (64, 256), ("fsdp", "tensor")),
        (f"{BLOCK}/MlpBlock_0/Dense_0/bias", (256,), ("tensor",)),
        (f"{BLOCK}/MlpBlock_0/Dense_1/kernel", (256, 64), ("tensor", "fsdp")),
        (f"{BLOCK}/MlpBlock_0/Dense_1/bias", (64,), (None,)),
        (f"{BLOCK}/MlpBlock_0/gate/kernel", (64, 256), ("fsdp", "tensor")),
        (
            "Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel",
            (128, 64, 4, 16),
            (None, "fsdp", "tensor", None),
        ),
        (
            "Transformer/encoderblock/MlpBlock_0/Dense_1/kernel",
            (2, 256, 64),
            (None, "tensor", "fsdp"),
        ),
        ("Transformer/encoderblock/LayerNorm_0/scale", (128, 63), (None, None)),
        ("MixerBlock_0/token_mixing/Dense_0/kernel", (196, 384), ("fsdp", "tensor")),
        ("MixerBlock_0/channel_mixing/Dense_1/kernel", (256, 64), ("tensor", "fsdp")),
        ("embedding/kernel", (16, 16, 3, 64), (None, None, None, "fsdp")),
        ("Transformer/posembed_input/pos_embedding", (1, 197, 64), (None, None, "fsdp")),
        ("Transformer/encoder_norm/scale", (64,), (None,)),
        ("head/kernel", (64, 1000), ("fsdp", "tensor")),
        ("head/kernel", (64, 21843), ("tensor", None)),
        ("opt_state/1/0/mu/head/kernel", (64, 1000), ("fsdp", "tensor")),
        ("opt_state/1/0/count", (), ()),
    ],
)
def test_parameters_go_by_the_rules(path, shape, spec):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert param_spec(path, shape, mesh) == PartitionSpec(*spec)


def test_heads_that_tensor_parallelism_does_not_divide_are_refused():
    mesh = make_mesh(data=4, tensor=2)
    with pytest.raises(UserError, match=r"mesh\.tensor=2 does not divide 3"):
        param_spec(f"{BLOCK}/MultiHeadDotProductAttention_0/query/kernel", (192, 3, 64), mesh)


def test_no_large_parameter_is_copied_under_fsdp():
    mesh = make_mesh(data=1, fsdp=8)
    model = make_vit(num_classes=21_843, variant="B/16", representation_size=768)
    image = jnp.zeros((1, 224, 224, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False)["params"])
    for path, sharding in flatten(infer_shardings(shapes, mesh)).items():
        size = flatten(shapes)[path].size
        assert size < 100_000 or "fsdp" in sharding.spec, path


def test_constraint_is_really_applied():
    mesh = make_mesh(data=4, tensor=2)
    x = jax.jit(functools.partial(constrain, names=("batch", "classes"), mesh=mesh))(
        jnp.zeros((8, 6))
    )
    assert {s.data.shape for s in x.addressable_shards} == {(2, 3)}
    with pytest.raises(KeyError):
        constrain(jnp.zeros((8, 6)), ("batch", "no_such_name"), mesh=mesh)
    with pytest.raises(ValueError, match="1 names"):
        constrain(jnp.zeros((8, 6)), ("batch",), mesh=mesh)


@pytest.mark.parametrize("num_classes", [256, 21_843])
def test_loss_is_computed_over_sharded_classes(num_classes):
    """No device ever holds the logits of all classes, even if their number is odd."""
    mesh = make_mesh(data=4, tensor=2)
    model = make_vit(
        num_classes=num_classes,
        patch_size=4,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        mlp_dim=32,
        constrain=functools.partial(constrain, mesh=mesh),
    )
    objective = make_supervised(model=model, num_classes=num_classes)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.uint8, sharding=batch_sharding(mesh)),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32, sharding=batch_sharding(mesh)),
    }
    zeros = {k: jnp.zeros(v.shape, v.dtype) for k, v in batch.items()}
    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0), zeros))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        infer_shardings(shapes, mesh),
    )

    def loss(params, batch):
        rng = jax.random.key(0)
        return objective.loss(params, objective.augment(batch, rng), rng)[0]

    text = jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text()
    half = -(-num_classes // 2)
    assert re.search(rf"f32\[2,{half}\]", text)  # 8 images over 4, classes over 2
    assert not re.search(rf"\[2,{num_classes}\]", text)
    assert not re.search(rf"\[8,{num_classes}\]", text)
