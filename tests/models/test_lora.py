# SPDX-License-Identifier: Apache-2.0
"""Adapters: their arithmetic, which kernels have one, and merging them."""

import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from tests.models.compiled import compiled
from vit_jax.checkpoint.pretrained.weights import unstack_blocks
from vit_jax.models.lora import Lora, LoraProduct, merge_adapters, round_base, round_to_int8
from vit_jax.models.products import dot_stored
from vit_jax.models.vit import VisionTransformer
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

# Outputs of microsoft/LoRA (loralib 0.1.2, MIT).
GOLDEN = Path(__file__).parent.parent / "testdata" / "lora"
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))


def make_vit(**changes):
    sizes = {"patch_size": (4, 4), "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    return VisionTransformer(**({"num_classes": 3, "mlp_dim": 32} | sizes | changes))


def init_randomly(model):
    """Random values for all parameters, so that no adapter or head is zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))["params"]
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(GOLDEN / "io.npz")) | load_file(GOLDEN / "params.safetensors")
    return arrays, json.loads((GOLDEN / "lora.json").read_text())


def apply_linear(kernel, bias, a, b, x, *, alpha):
    """A dense layer with an adapter, whose parameters are given."""
    lora = Lora(rank=a.shape[1], alpha=alpha, targets=(".*",))
    dense = nn.Dense(kernel.shape[1], dot_general_cls=lambda: LoraProduct(lora, name="lora"))
    params = {"kernel": kernel, "bias": bias, "lora": {"a": a, "b": b}}
    return compiled(dense)({"params": params}, x)


def test_layer_equals_that_of_loralib(golden):
    arrays, about = golden
    a, b = arrays["lora_A"].T, arrays["lora_B"].T
    kernel, bias = arrays["weight"].T, arrays["bias"]
    found = apply_linear(kernel, bias, a, b, arrays["x"], alpha=about["alpha"])
    np.testing.assert_allclose(found, arrays["y"], atol=1e-5)


def test_merged_kernel_equals_that_of_loralib(golden):
    arrays, about = golden
    params = {"layer/kernel": arrays["weight"].T}
    params |= {"layer/lora/a": arrays["lora_A"].T, "layer/lora/b": arrays["lora_B"].T}
    lora = Lora(rank=about["r"], alpha=about["alpha"], targets=(".*",))
    merged = merge_adapters(params, lora)
    assert list(merged) == ["layer/kernel"]
    np.testing.assert_allclose(merged["layer/kernel"].T, arrays["merged_weight"], atol=1e-6)


def test_initial_a_is_uniform_and_b_is_zero(golden):
    lora = Lora(rank=16, targets=(".*",))
    dense = nn.Dense(400, dot_general_cls=lambda: LoraProduct(lora, name="lora"))
    params = dense.init(jax.random.key(0), jnp.zeros((1, 900)))["params"]["lora"]
    a = np.asarray(params["a"])
    assert 0.99 / 30 < np.abs(a).max() <= 1 / 30
    assert abs(a.std() - 1 / 30 / np.sqrt(3)) < 2e-4
    assert not np.asarray(params["b"]).any()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("scan", [False, True])
def test_merged_model_equals_the_one_with_adapters(method, scan):
    lora = Lora(rank=3, alpha=7.0, method=method)
    model = make_vit(lora=lora, scan=scan)
    params = init_randomly(model)
    logits, _ = compiled(model)({"params": params}, IMAGES, train=False)
    merged = merge_adapters(unstack_blocks(flatten(params)), lora)
    plain = traverse_util.unflatten_dict(merged, sep="/")
    expected, _ = compiled(make_vit())({"params": plain}, IMAGES, train=False)
    np.testing.assert_allclose(logits, expected, atol=2e-6)


def restore_base(params, dtype):
    """The float32 values of kernels that are stored in another dtype."""

    def restore(tree):
        if not isinstance(tree, dict):
            return tree
        tree = {name: restore(x) for name, x in tree.items()}
        if getattr(tree.get("kernel"), "dtype", None) == dtype:
            scale = tree["lora"].pop("kernel_scale") if dtype == jnp.int8 else 1
            kernel = np.asarray(tree["kernel"], np.float32)
            tree |= {"kernel": kernel * np.asarray(scale)}
        return tree

    return restore(jax.device_get(params))


@pytest.mark.parametrize(
    ("base", "method", "scan"),
    [("int8", "lora", False), ("int8", "dora", True), ("bfloat16", "lora", True)],
)
def test_model_with_a_rounded_base_equals_the_float_model_of_its_values(base, method, scan):
    lora = Lora(rank=2, alpha=5.0, method=method, base=base)
    model = make_vit(lora=lora, scan=scan)
    dtype = jnp.dtype(base)
    params = lora.store(init_randomly(model))
    plain = make_vit(lora=Lora(rank=2, alpha=5.0, method=method), scan=scan)
    values = restore_base(params, dtype)
    stored = {p for p, x in flatten(params).items() if x.dtype == dtype}
    assert len(stored) == (6 if scan else 12)

    def grads(model, params):
        flat = flatten(params)
        trained = {p: x for p, x in flat.items() if "/lora/" in p and "scale" not in p}

        def loss(trained):
            tree = traverse_util.unflatten_dict({**flat, **trained}, sep="/")
            return jnp.sum(jnp.sin(model.apply({"params": tree}, IMAGES, train=False)[0]))

        return jax.jit(jax.value_and_grad(loss))(trained)

    (found, found_grads), (expected, expected_grads) = grads(model, params), grads(plain, values)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found_grads.keys() == expected_grads.keys()
    for path, x in expected_grads.items():
        np.testing.assert_allclose(found_grads[path], x, rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("base", ["int8", "bfloat16"])
def test_base_is_rounded_alike_when_weights_are_read(base):
    lora = Lora(rank=2, targets=(".*/query/kernel",), base=base, train=(".*/Dense_1/kernel",))
    params = init_randomly(make_vit(lora=lora))
    plain = {p: x for p, x in flatten(params).items() if "/lora/" not in p or "scale" in p}
    found = round_base(plain, lora)
    expected = flatten(restore_base(lora.store(params, xp=np), jnp.dtype(base)))
    for path, x in found.items():
        if "/lora/" in path:
            continue
        np.testing.assert_array_equal(x, expected[path], err_msg=path)
        rounded = lora.rounds(path)
        assert np.array_equal(x, plain[path]) != rounded
        assert rounded == bool(re.fullmatch(".*(Attention_0/.*|Dense_0)/kernel", path))


def test_int8_kernel_has_the_largest_magnitude_of_each_channel():
    kernel = np.array([[0.5, -2.0, 0], [-1.27, 1.0, 0]], np.float32)
    values, scale = round_to_int8(kernel, (0,), xp=np)
    np.testing.assert_array_equal(values, [[50, -127, 0], [-127, 64, 0]])
    np.testing.assert_allclose(scale, [[0.01, 2 / 127, 1]], rtol=1e-6)
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jnp.asarray([[1.0, 2.0]], dtype)
        found = dot_stored(x, jnp.asarray(values), jnp.asarray(scale), 1)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float32), x @ (values * scale), rtol=1e-2)


@pytest.mark.parametrize("base", ["int8", "bfloat16"])
def test_stored_kernels_are_restored_to_values_that_are_stored_the_same(base):
    lora = Lora(rank=2, base=base)
    params = jax.tree.map(np.asarray, init_randomly(make_vit(lora=lora)))
    stored = lora.store(params, xp=np)
    restored = lora.restore(stored)
    assert {x.dtype for x in jax.tree.leaves(restored)} == {np.dtype(np.float32)}
    jax.tree.map(np.testing.assert_array_equal, stored["head"], restored["head"])
    again = lora.store(restored, xp=np)
    assert flatten(again).keys() == flatten(stored).keys()
    for path, x in flatten(stored).items():
        np.testing.assert_allclose(
            np.float32(flatten(again)[path]), np.float32(x), rtol=1e-6, err_msg=path
        )


def test_parameters_stay_as_they_are_without_a_rounded_base():
    lora = Lora(rank=2)
    params = init_randomly(make_vit(lora=lora))
    assert lora.store(params) is params
    assert lora.restore(params) is params
    assert not any("kernel_scale" in path for path in flatten(params))


def test_base_is_rounded_where_the_model_rounds_it():
    lora = Lora(rank=2, targets=(".*",), base="int8")
    kernel = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    scale = np.ones((1, 3), np.float32)
    base = {"embedding/kernel": kernel, "a/kernel": kernel, "a/lora/kernel_scale": scale}
    found = round_base(base, lora)
    np.testing.assert_array_equal(found["embedding/kernel"], kernel)
    values, scale = round_to_int8(kernel, (0,), xp=np)
    np.testing.assert_array_equal(found["a/kernel"], values * scale)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_run_starts_from_the_model_without_adapters(method):
    model = make_vit(lora=Lora(rank=2, method=method))
    params = model.init(jax.random.key(0), IMAGES, train=False)["params"]
    flat = {path: x for path, x in flatten(params).items() if "/lora/" not in path}
    logits = compiled(model)({"params": params}, IMAGES, train=False)[1]["pre_logits"]
    plain = {"params": traverse_util.unflatten_dict(flat, sep="/")}
    expected = compiled(make_vit())(plain, IMAGES, train=False)[1]["pre_logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_dora_scales_each_column_to_its_norm():
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.normal(size=s) for s in ((6, 4), (6, 2), (2, 4)))
    magnitude, x = rng.uniform(0.5, 2, 4), rng.normal(size=(3, 6))
    adapted = kernel + 1.5 * a @ b
    # Equation 5 of arXiv:2402.09353, where the trained norm is a factor on that of the kernel.
    norm = magnitude * np.linalg.norm(kernel, axis=0)
    expected = x @ (norm * adapted / np.linalg.norm(adapted, axis=0))
    lora = Lora(rank=2, alpha=3.0, method="dora", targets=(".*",))
    dense = nn.Dense(4, use_bias=False, dot_general_cls=lambda: LoraProduct(lora, name="lora"))
    params = {"kernel": kernel, "lora": {"a": a, "b": b, "magnitude": magnitude}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    found = compiled(dense)({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dora_leaves_a_column_of_zeros():
    rng = np.random.default_rng(0)
    lora = Lora(rank=2, method="dora", targets=(".*",))
    dense = nn.Dense(4, use_bias=False, dot_general_cls=lambda: LoraProduct(lora, name="lora"))
    kernel = rng.normal(size=(6, 4)).astype(np.float32) * [1, 0, 1, 1]
    adapter = {"a": rng.normal(size=(6, 2)), "b": np.zeros((2, 4)), "magnitude": np.full(4, 2.0)}
    params = jax.tree.map(jnp.float32, {"kernel": kernel, "lora": adapter})
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    out, grads = jax.jit(jax.value_and_grad(lambda p: jnp.sum(dense.apply({"params": p}, x) ** 2)))(
        params
    )
    np.testing.assert_allclose(out, np.sum((x @ (2 * kernel)) ** 2), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    merged = merge_adapters({f"a/{p}": np.asarray(x) for p, x in flatten(params).items()}, lora)
    np.testing.assert_allclose(merged["a/kernel"], 2 * kernel, rtol=1e-6)


def test_pattern_of_a_scale_adds_no_adapters():
    lora = Lora(rank=4, targets=(".*/query/kernel",), patterns=((".*", {"alpha": 16}),))
    assert lora.size("a/query/kernel") == (4, 4.0)
    assert lora.size("a/key/kernel") == (0, 0.0)
    # Where a checkpoint has an adapter, its scale is that of the pattern.
    assert lora.scale("a/key/kernel", 4) == 4.0


def test_patterns_give_ranks_and_scales():
    value = ".*/value/kernel", {"rank": 8, "alpha": 2.0}
    lora = Lora(
        rank=4,
        alpha=8,
        targets=(".*/(query|value|out)/kernel",),
        patterns=(value, ("b/.*", {"rank": 0})),
    )
    assert lora.size("a/query/kernel") == (4, 2.0)
    assert lora.size("a/value/kernel") == (8, 0.25)
    assert lora.size("b/query/kernel") == (0, 0.0)
    assert lora.size("a/key/kernel") == (0, 0.0)
    assert Lora(rank=16, alpha=8, scaling="sqrt", targets=(".*",)).size("x") == (16, 2.0)
    assert Lora(rank=16, targets=(".*",)).size("x") == (16, 1.0)


def test_only_matching_kernels_have_adapters():
    model = make_vit(lora=Lora(rank=2, targets=(".*encoderblock_1/.*/(query|Dense_1)/kernel",)))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))["params"]
    found = {path.removesuffix("/lora/a") for path in flatten(shapes) if path.endswith("/lora/a")}
    block = "Transformer/encoderblock_1"
    assert found == {
        f"{block}/MultiHeadDotProductAttention_0/query",
        f"{block}/MlpBlock_0/Dense_1",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "lora.rank=-1: expected 1 or more"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha=0.0: expected above 0"),
        ({"base": "int8"}, "lora.base='int8' without lora.rank: there are no adapters"),
        ({"alpha": 8.0}, "lora.alpha=8.0 without lora.rank"),
        ({"patterns": (("a", {"rank": 8}),)}, r"lora.patterns=.* without lora.rank"),
        ({"rank": 2, "targets": ("(",)}, "'\\(' is not a regular expression"),
        ({"rank": 2, "patterns": (("a", {"ranks": 1}),)}, "unknown config key .*ranks"),
        ({"rank": 2, "patterns": (("a", {"rank": -2}),)}, r"\['a'\].rank=-2: expected"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Lora(**changes)


def test_rank_above_a_dimension_is_refused():
    model = make_vit(lora=Lora(rank=17))
    with pytest.raises(UserError, match=r"lora.rank=17: .*/kernel is 16 x 16; expected at most 16"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))


def test_target_without_a_kernel_is_refused():
    paths = ["a/query/lora/a", "a/query/kernel", "head/kernel"]
    Lora(rank=2, targets=(".*/query/kernel",)).check(paths)
    with pytest.raises(UserError, match=r"'.*/querry/kernel' matches no kernel"):
        Lora(rank=2, targets=(".*/query/kernel", ".*/querry/kernel")).check(paths)
    with pytest.raises(UserError, match=r"'.*/query' matches no kernel"):
        Lora(rank=2, targets=(".*/query",)).check(paths)


def test_pattern_and_train_that_match_nothing_are_refused():
    paths = ["a/query/lora/a", "a/query/kernel", "a/key/kernel", "head/kernel"]
    without = (".*/key/kernel", {"rank": 0})
    train = ("head/.*", "head_dist/.*", ".*/query/kernel")
    Lora(rank=2, patterns=(without, ("a/query/.*", {"alpha": 8})), train=train).check(paths)
    with pytest.raises(UserError, match=r"lora.patterns: 'b/.*' matches no kernel that has an"):
        Lora(rank=2, patterns=(without, ("b/.*", {"rank": 8}))).check(paths)
    with pytest.raises(UserError, match=r"lora.train: 'headd/.*' matches no parameter"):
        Lora(rank=2, train=("headd/.*",)).check(paths)


def test_adapter_that_does_not_fit_is_refused():
    params = {"a/kernel": np.ones((4, 4)), "a/lora/a": np.ones((5, 2)), "a/lora/b": np.ones((2, 4))}
    with pytest.raises(ValueError, match="a/lora/a does not fit"):
        merge_adapters(params, Lora(rank=2))
