# SPDX-License-Identifier: Apache-2.0
"""Meshes, the placement of parameters, and activations that stay where they are put."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.models.random_params import random_params
from vit_jax.models.variants import make_two_towers, make_vit
from vit_jax.objectives.supervised import make_supervised
from vit_jax.parallel.mesh import (
    AXES,
    arrange,
    batch_sharding,
    check_batch_size,
    choose_layout,
    make_mesh,
    process_shards,
    shard_batch,
)
from vit_jax.parallel.sharding import (
    Strategy,
    constrain,
    find_large_copies,
    infer_shardings,
    param_spec,
)
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
        ({"fsdp": 3}, "such as data=2 x fsdp=4 x tensor=1 or data=4 x fsdp=2 x tensor=1"),
        ({"data": 2, "fsdp": 2}, "data=2 x fsdp=2 x tensor=1 does not make 8"),
        ({"data": -1, "fsdp": -1}, "mesh.fsdp=-1: only one axis can fill"),
        ({"tensor": 0}, "mesh.tensor=0: expected at least 1"),
        ({"dcn": {"data": 2}}, "mesh.dcn: data=2 x fsdp=1 x tensor=1 does not make 1 group"),
        (
            {"dcn": {"date": 2}},
            "unknown config key mesh.dcn.date; did you mean '--config.mesh.dcn.data'",
        ),
    ],
)
def test_impossible_meshes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A device of one of several nodes."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def nodes(count, each):
    # As JAX may list them: not node by node.
    return [Gpu(n * each + i, n) for i in range(each) for n in range(count)]


@pytest.mark.parametrize(
    ("sizes", "dcn", "crossing"),
    [
        ((2, 8, 1), None, ("data",)),
        ((4, 2, 2), {"data": -1}, ("data",)),
        ((1, 16, 1), None, ("fsdp",)),
        ((2, 8, 1), {"fsdp": 2}, ("fsdp",)),
    ],
)
def test_only_the_chosen_axis_crosses_the_slow_network(sizes, dcn, crossing):
    sizes = dict(zip(AXES, sizes, strict=True))
    grid = arrange(nodes(2, 8), sizes, dcn)
    node = np.vectorize(lambda d: d.slice_index)(grid)
    for i, axis in enumerate(AXES):
        assert (np.ptp(node, axis=i).max() > 0) == (axis in crossing)


def test_axes_that_do_not_fit_the_nodes_are_refused():
    sizes = {"data": 1, "fsdp": 3, "tensor": 8}
    with pytest.raises(UserError, match=r"mesh.dcn: data=2 .* does not make 3 group"):
        arrange(nodes(3, 8), sizes, {"data": 2})
    with pytest.raises(UserError, match=r"mesh.data=1 is not divisible by mesh.dcn.data=3"):
        arrange(nodes(3, 8), sizes, {"data": -1})


@pytest.mark.parametrize("sizes", [(1, 1, 16), (2, 1, 8)])
def test_tensor_parallelism_crosses_the_slow_network_only_if_it_is_asked_to(sizes):
    sizes, devices = dict(zip(AXES, sizes, strict=True)), nodes(4, 4)
    with pytest.raises(UserError, match=r"mesh.tensor=\d+ would cross the slow network between 4"):
        arrange(devices, sizes, None)
    dcn = {"data": sizes["data"], "tensor": 4 // sizes["data"]}
    assert arrange(devices, sizes, dcn).shape == tuple(sizes.values())


RULES = (("v5 lite x256", {"fsdp": 256}), ("H100.* x(8|16)$", {"fsdp": 8, "dcn": {"data": -1}}))


def test_a_recipe_names_its_layout_by_device():
    section, said = choose_layout({"tensor": 1, "rules": RULES}, nodes(2, 8))
    assert section == {"tensor": 1, "fsdp": 8, "dcn": {"data": -1}}
    assert "fits NVIDIA H100 80GB HBM3 x16: fsdp=8" in (said or "")
    assert choose_layout({"rules": RULES}, jax.devices()) == ({}, "mesh.rules: none fits cpu x8")
    with pytest.raises(UserError, match=r"mesh.rules: '\*' is not a regular expression"):
        choose_layout({"rules": (("*", {}),)}, jax.devices())


def test_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(data=4, tensor=2)
    check_batch_size(12, mesh, key="data.batch_size")
    with pytest.raises(UserError, match=r"data.batch_size=10 is not divisible by 4"):
        check_batch_size(10, mesh, key="data.batch_size")


def test_batch_is_split_over_data_and_fsdp_and_copied_over_tensor():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    batch = shard_batch({"image": np.arange(8.0).reshape(8, 1)}, mesh)
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


@pytest.mark.parametrize(
    ("sizes", "path", "shape", "spec"),
    [
        ({"data": 8}, "opt_state/0/mu/head/kernel", (64, 1000), (None, "data")),
        ({"data": 8}, "params/head/kernel", (64, 1000), (None, None)),
        (
            {"data": 4, "fsdp": 2},
            "opt_state/0/mu/head/kernel",
            (64, 1001),
            (("fsdp", "data"), None),
        ),
        ({"data": 4, "fsdp": 2}, "opt_state/0/mu/head/kernel", (64, 1000), ("data", "fsdp")),
        ({"data": 8}, "opt_state/0/mu/head/bias", (1000,), (None,)),
    ],
)
def test_zero1_splits_optimizer_state_over_data(sizes, path, shape, spec):
    mesh = make_mesh(**sizes)
    assert param_spec(path, shape, mesh, Strategy(zero1=True)) == PartitionSpec(*spec)


def test_large_copies_that_the_mesh_should_avoid_are_found():
    mesh = make_mesh(data=1, fsdp=8)
    shapes = {"odd": jnp.zeros((1021, 1031)), "even": jnp.zeros((1024, 1024))}
    placed = jax.device_put(shapes, infer_shardings(shapes, mesh))
    assert find_large_copies(placed) == {"odd": 4 * 1021 * 1031}
    assert find_large_copies(jax.device_put(shapes, infer_shardings(shapes, make_mesh()))) == {}


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
    for sequence_parallel, tokens in ((False, 6), (True, 3)):
        x = jax.jit(
            functools.partial(
                constrain, names=("batch", "tokens"), mesh=mesh, sequence_parallel=sequence_parallel
            )
        )(jnp.zeros((8, 6)))
        assert {s.data.shape for s in x.addressable_shards} == {(2, tokens)}
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


@pytest.mark.parametrize(
    ("dtype", "element"), [("float32", "f32"), ("bfloat16", "bf16")], ids=["float32", "bfloat16"]
)
def test_gradients_of_blocks_cross_the_network_in_the_dtype_of_the_model(dtype, element, tmp_path):
    """Seen after partitioning: what runs on CPUs sums in float32, as they have no other sums."""
    mesh = make_mesh(data=8)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 24}
    model = make_vit(
        num_classes=5,
        patch_size=4,
        **sizes,
        dtype=dtype,
        constrain=functools.partial(constrain, mesh=mesh),
    )
    sharding = batch_sharding(mesh)
    images = jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.float32, sharding=sharding)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)

    def loss(params, images):
        return model.apply(params, images, train=False)[0].astype(jnp.float32).mean()

    everywhere = jax.sharding.NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        jax.grad(loss), in_shardings=(everywhere, sharding), out_shardings=everywhere
    ).lower(shapes, images)
    step.compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"})
    (partitioned,) = tmp_path.glob("*after_spmd-partitioning*.txt")
    reduced = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-reduce\(", partitioned.read_text())
    assert {kind for kind, shape in reduced if shape in ("16,24", "24,16")} == {element}
    assert ("f32", "16") in reduced  # Norms are float32 whatever the dtype.


TOWERS = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "mlp_dim": 48}


def make_pair(**options):
    return make_two_towers(
        image=TOWERS | {"patch_size": 4, "classifier": "map"},
        text=TOWERS | {"vocab_size": 50, "context_length": 8, "causal": True},
        width=16,
        bias_init=-10.0,
        **options,
    )


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("txt/Embed_0/embedding", (50, 32), ("tensor", "fsdp")),
        ("txt/Embed_0/embedding", (51, 32), (None, "tensor")),
        ("opt_state/0/mu/txt/Embed_0/embedding", (50, 32), ("tensor", "fsdp")),
        ("txt/head/kernel", (32, 50), ("fsdp", "tensor")),
        (
            "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel",
            (2, 32, 48),
            (None, "fsdp", "tensor"),
        ),
        ("txt/Transformer/posembed_input/pos_embedding", (1, 8, 32), ()),
        ("t", (1,), ()),
    ],
)
def test_towers_are_sharded_by_the_rules_of_their_layers(path, shape, spec):
    got = tuple(param_spec(path, shape, make_mesh(data=2, fsdp=2, tensor=2)))
    assert got == spec + (None,) * (len(shape) - len(spec))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_sharded_towers_give_the_embeddings_and_gradients_of_one_device(sequence_parallel):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    place = functools.partial(constrain, mesh=mesh, sequence_parallel=sequence_parallel)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(8, 8, 8, 3)).astype(np.float32)
    tokens = rng.integers(0, 50, (8, 8)).astype(np.int32)
    params = random_params(make_pair(), images, tokens, train=False)

    def loss(params, images, tokens, model):
        zimg, ztxt, out = model.apply({"params": params}, images, tokens, train=True)
        logits = out["scale"] * zimg @ ztxt.T + out["bias"]
        return jnp.sum(jax.nn.softplus(logits)) - jnp.trace(logits)

    one = jax.value_and_grad(functools.partial(loss, model=make_pair()))
    want, expected = jax.jit(one)(params, images, tokens)
    sharded = jax.device_put(params, infer_shardings(params, mesh))
    batch = shard_batch({"images": images, "tokens": tokens}, mesh)
    many = jax.value_and_grad(functools.partial(loss, model=make_pair(constrain=place)))
    got, gradients = jax.jit(many)(sharded, **batch)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    expected, gradients = flatten(expected), flatten(gradients)
    for path, value in expected.items():
        np.testing.assert_allclose(gradients[path], value, rtol=1e-3, atol=1e-4, err_msg=path)
    spec = flatten(sharded)["txt/Embed_0/embedding"].sharding.spec
    assert spec == PartitionSpec("tensor", "fsdp")
