# SPDX-License-Identifier: Apache-2.0
"""Options of the Vision Transformer: what each computes, and that it costs nothing when off."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tests.models.compiled import compiled
from tests.models.numpy_layers import normalise
from tests.models.random_params import random_params
from vit_jax.models.heads import MAPHead
from vit_jax.models.positions import initial_frequencies, relate_tokens, sincos_2d
from vit_jax.models.variants import make_vit
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

TINY = {"patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "mlp_dim": 32}


def init(model, shape=(2, 8, 12, 3)):
    images = np.random.default_rng(9).uniform(-1, 1, shape).astype(np.float32)
    return random_params(model, images, train=False), images


def run(model, params, images, *, train=False, seed=0):
    rngs = {"dropout": jax.random.key(seed)}
    apply = jax.jit(functools.partial(model.apply, train=train))
    return apply({"params": params}, images, rngs=rngs)


CENTERED = {"rope_theta": 100.0, "rope_coordinates": "centered"}


def test_map_classifier_has_no_class_token():
    model = make_vit(num_classes=5, classifier="map", **TINY)
    params, images = init(model)
    logits, out = run(model, params, images)
    assert logits.shape == (2, 5)
    assert "cls" not in params
    head = MAPHead(model.block_config)
    want = compiled(head)({"params": params["MAPHead_0"]}, out["encoded"], train=False)
    np.testing.assert_allclose(out["pre_logits"], want, atol=1e-6)


def test_registers_stand_behind_the_class_token_and_have_no_position():
    model = make_vit(num_classes=5, num_registers=2, **TINY)
    params, images = init(model)
    assert params["Transformer"]["registers"].shape == (1, 2, 16)
    assert params["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 7, 16)
    logits, out = run(model, params, images)
    assert out["encoded"].shape == (2, 9, 16)
    assert model.num_prefix_tokens == 3

    plain = make_vit(num_classes=5, **TINY)
    rest = {k: v for k, v in params["Transformer"].items() if k != "registers"}
    without, _ = run(plain, params | {"Transformer": rest}, images)
    assert np.abs(logits - without).max() > 1e-3
    # Their order is of no consequence, since nothing says where they are.
    swapped = params | {
        "Transformer": params["Transformer"]
        | {"registers": params["Transformer"]["registers"][:, ::-1]}
    }
    np.testing.assert_allclose(run(model, swapped, images)[0], logits, atol=1e-5)


def test_gap_leaves_registers_out():
    model = make_vit(num_classes=5, classifier="gap", num_registers=2, **TINY)
    params, images = init(model)
    _, out = run(model, params, images)
    np.testing.assert_allclose(out["pre_logits"], out["encoded"][:, 2:].mean(axis=1), atol=1e-6)


def test_norm_after_pooling():
    model = make_vit(num_classes=5, classifier="gap", norm_after_pooling=True, **TINY)
    params, images = init(model)
    _, out = run(model, params, images)
    assert "encoder_norm" not in params["Transformer"]
    want = normalise(out["encoded"].mean(axis=1), params["fc_norm"])
    np.testing.assert_allclose(out["pre_logits"], want, atol=1e-5)


def test_norm_epsilon_reaches_every_norm():
    model = make_vit(num_classes=5, norm_epsilon=0.1, qk_norm=True, **TINY)
    params, images = init(model)
    text = str(jax.make_jaxpr(lambda: run(model, params, images)[0])())
    # Two norms, of queries and of keys in each block, and the final one, add it to the variance.
    assert sum(" rsqrt " in line for line in text.splitlines()) == 2 * 4 + 1
    assert len(re.findall(r"add \w+ 0\.1\d*:f32", text)) == 2 * 4 + 1


def test_rms_norm_subtracts_no_mean_and_has_no_bias():
    model = make_vit(num_classes=5, norm="rms_norm", norm_epsilon=1e-2, qk_norm=True, **TINY)
    params, images = init(model)
    norms = [path for path in flatten(params) if "norm" in path.lower()]
    assert len(norms) == 2 * 4 + 1
    assert all(path.endswith("/scale") for path in norms)
    _, out = run(model, params, images)
    _, plain = run(make_vit(num_classes=5, norm="rms_norm", qk_norm=True, **TINY), params, images)
    assert np.abs(out["encoded"] - plain["encoded"]).max() > 1e-3
    # Root mean squares of the normalised tokens are at most 1 before the scale.
    scaled = np.asarray(out["encoded"]) / params["Transformer"]["encoder_norm"]["scale"]
    assert np.sqrt(np.square(scaled).mean(-1)).max() <= 1 + 1e-5


def test_class_tokens_and_registers_may_have_a_final_norm_of_their_own():
    model = make_vit(num_classes=5, num_registers=2, untied_norm=True, **TINY)
    params, images = init(model)
    tied = make_vit(num_classes=5, num_registers=2, **TINY)
    encoder = dict(params["Transformer"])
    own = encoder.pop("prefix_norm")
    _, out = run(model, params, images)
    _, patches = run(tied, params | {"Transformer": encoder}, images)
    _, first = run(tied, params | {"Transformer": encoder | {"encoder_norm": own}}, images)
    np.testing.assert_allclose(out["encoded"][:, 3:], patches["encoded"][:, 3:], atol=1e-6)
    np.testing.assert_allclose(out["encoded"][:, :3], first["encoded"][:, :3], atol=1e-6)
    np.testing.assert_allclose(out["pre_logits"], first["pre_logits"], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"position_embedding": "relative", "scan": True},
        {"position_embedding": "none", "rope_theta": 10.0, "rope_frequencies": "mixed"},
    ],
    ids=["relative", "mixed"],
)
def test_positions_of_attention_go_with_the_patches(options):
    model = make_vit(num_classes=5, num_registers=1, **options, **TINY)
    params, images = init(model)
    count = math.prod(model.grid(images.shape[1:3]))
    order = np.random.default_rng(0).permutation(count)[None].repeat(len(images), 0)
    want, _ = run(model, params, images)
    found = model.apply({"params": params}, images, train=False, patches=jnp.asarray(order))[0]
    np.testing.assert_allclose(found, want, atol=1e-5)
    # The order of the patches alone matters.
    flat = flatten(params)
    name = next(p for p in flat if p.endswith(("/relative_position_bias", "/rope_frequencies")))
    still = unflatten_dict(flat | {name: np.zeros_like(flat[name])}, sep="/")
    assert np.abs(run(model, still, images)[0] - want).max() > 1e-3


def test_mixed_frequencies_start_from_turned_axes():
    rows, columns = initial_frequencies(jax.random.key(0), (2, 3, 8), 10.0)
    sizes = 10.0 ** -(4 * np.arange(4) / 16)
    np.testing.assert_allclose(np.hypot(rows, columns), np.tile(sizes, (3, 2)), rtol=1e-5)
    # The second half turns with the direction across that of the first.
    dots = rows[:, :4] * rows[:, 4:] + columns[:, :4] * columns[:, 4:]
    np.testing.assert_allclose(dots, 0, atol=1e-6)
    assert len(np.unique(np.round(rows[:, 0], 3))) == 3


def test_relative_positions_are_of_the_query_minus_the_key():
    relative = relate_tokens((2, 3), 2)
    assert relative.count == 3 * 5 + 3
    index = relative.index
    places = [(i, j) for i in range(2) for j in range(3)]
    for q, (i, j) in enumerate(places):
        for k, (m, n) in enumerate(places):
            assert index[2 + q, 2 + k] == (i - m + 1) * 5 + (j - n + 2)
    assert (index[:2, 2:] == 15).all()
    assert (index[2:, :2] == 16).all()
    assert (index[:2, :2] == 17).all()


def test_coordinates_vary_in_training_alone():
    model = make_vit(num_classes=5, position_embedding="none", **CENTERED, **TINY)
    noisy = model.clone(rope_shift=0.5, rope_jitter=1.5, rope_rescale=2.0)
    params, images = init(model)
    want, _ = run(model, params, images)
    np.testing.assert_array_equal(run(noisy, params, images)[0], want)
    first, second = (run(noisy, params, images, train=True, seed=i)[0] for i in range(2))
    assert np.abs(first - want).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(run(noisy, params, images, train=True)[0], first)


def test_fixed_positions_equal_learned_ones_of_the_same_values():
    fixed = make_vit(num_classes=5, position_embedding="sincos2d", **TINY)
    learned = make_vit(num_classes=5, **TINY)
    params, images = init(fixed)
    assert "posembed_input" not in params["Transformer"]
    embedding = np.concatenate([np.zeros((1, 1, 16)), sincos_2d((2, 3), 16)], axis=1)
    same = params | {
        "Transformer": params["Transformer"]
        | {"posembed_input": {"pos_embedding": embedding.astype(np.float32)}}
    }
    got, want = run(fixed, params, images)[0], run(learned, same, images)[0]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_without_positions_the_order_of_patches_is_lost_and_rope_brings_it_back():
    shuffled = {}
    for theta in (None, 100.0):
        model = make_vit(num_classes=5, position_embedding="none", rope_theta=theta, **TINY)
        params, images = init(model)
        flipped = jnp.concatenate([images[:, 4:], images[:, :4]], axis=1)
        shuffled[theta] = np.abs(
            run(model, params, images)[0] - run(model, params, flipped)[0]
        ).max()
    assert shuffled[None] < 1e-5
    assert shuffled[100.0] > 1e-3


def test_stochastic_depth_rises_linearly_from_zero():
    # With a rate just under 1 the last block's branches are as good as always dropped, and the
    # first block's never.
    model = make_vit(num_classes=5, stochastic_depth_rate=1 - 1e-6, **TINY)
    first = make_vit(num_classes=5, **(TINY | {"num_layers": 1}))
    params, images = init(model)
    got = run(model, params, images, train=True)[1]["encoded"]
    one = params | {
        "Transformer": {k: v for k, v in params["Transformer"].items() if k != "encoderblock_1"}
    }
    np.testing.assert_allclose(got, run(first, one, images)[1]["encoded"], atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_uniform_stochastic_depth_is_the_same_in_all_blocks(scan):
    # With a rate just under 1 all branches are as good as always dropped, those of the first block
    # too: as if nothing came out of them.
    options = {"stochastic_depth_rate": 1 - 1e-6, "stochastic_depth_schedule": "uniform"}
    model = make_vit(num_classes=5, scan=scan, **options, **TINY)
    params, images = init(model)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if re.search(r"'(out|Dense_1)'", str(path)) else x, params
    )
    got = run(model, params, images, train=True)[1]["encoded"]
    np.testing.assert_allclose(got, run(model, silent, images)[1]["encoded"], atol=1e-5)


def test_patch_dropout_keeps_the_rotations_of_the_patches_it_keeps():
    model = make_vit(
        num_classes=5, position_embedding="none", rope_theta=100.0, patch_dropout_rate=0.5, **TINY
    )
    params, images = init(model, (2, 16, 16, 3))
    logits, out = run(model, params, images, train=True)
    assert out["encoded"].shape == (2, 1 + 8, 16)
    assert np.isfinite(logits).all()


TRAIN_ONLY = ["stochastic_depth_rate", "patch_dropout_rate", "dropout_rate"]
OFF = {
    "rope_theta": (None, 100.0),
    "num_registers": (0, 2),
    "qk_norm": (False, True),
    "qkv_bias": ("all", "query_value"),
    "attention_norm": (False, True),
    "mlp_norm": (False, True),
    "norm": ("layer_norm", "rms_norm"),
    "layer_scale_init": (None, 1.0),
    "remat": ("none", "full"),
    "stochastic_depth_rate": (0.0, 0.5),
    "patch_dropout_rate": (0.0, 0.5),
    "dropout_rate": (0.0, 0.5),
}


@functools.cache
def equations(train, **options):
    """The operations of a training step's forward pass, one line each."""
    model = make_vit(num_classes=5, **TINY, **options)
    images = jax.ShapeDtypeStruct((2, 8, 12, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    text = str(jax.make_jaxpr(lambda p, x: run(model, p["params"], x, train=train))(shapes, images))
    return sorted(re.findall(r"= (\w+)", text))


@pytest.mark.parametrize("option", OFF)
def test_an_option_that_is_off_adds_no_operation(option):
    off, on = OFF[option]
    assert equations(True, **{option: off}) == equations(True)
    assert equations(True, **{option: on}) != equations(True)
    if option in TRAIN_ONLY:
        assert equations(False, **{option: on}) == equations(False)


def stack_blocks(params):
    blocks = [params["Transformer"][f"encoderblock_{i}"] for i in range(2)]
    stacked = {k: v for k, v in params["Transformer"].items() if "encoderblock" not in k}
    stacked["encoderblock"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    return params | {"Transformer": stacked}


def loss_and_gradients(model, params, images, **kwargs):
    def loss(params):
        logits, _ = run(model, params, images, train=True, **kwargs)
        return (logits * jnp.cos(jnp.arange(logits.size).reshape(logits.shape))).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param("none", marks=pytest.mark.slow),
        "dots",
        pytest.param("full", marks=pytest.mark.slow),
    ],
)
def test_scan_gives_the_function_and_the_gradients_of_the_loop(remat):
    options = {"qk_norm": True, "layer_scale_init": 0.5, "rope_theta": 100.0, "num_registers": 1}
    loop = make_vit(num_classes=5, **TINY, **options)
    scan = make_vit(num_classes=5, **TINY, **options, scan=True, remat=remat)
    params, images = init(loop)
    value, gradients = loss_and_gradients(loop, params, images)
    scanned_value, scanned_gradients = loss_and_gradients(scan, stack_blocks(params), images)
    np.testing.assert_allclose(scanned_value, value, rtol=1e-5)
    expected = flatten(stack_blocks(gradients))
    assert flatten(scanned_gradients).keys() == expected.keys()
    for path, gradient in flatten(scanned_gradients).items():
        np.testing.assert_allclose(gradient, expected[path], atol=2e-5, err_msg=path)


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param("dots", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.slow),
        "save:attn_out;offload:mlp_hidden",
    ],
)
def test_remat_gives_the_same_with_all_that_is_random(remat):
    options = {"dropout_rate": 0.2, "stochastic_depth_rate": 0.5, "patch_dropout_rate": 0.3}
    plain = make_vit(num_classes=5, **TINY, **options)
    again = make_vit(num_classes=5, **TINY, **options, remat=remat)
    params, images = init(plain)
    value, gradients = loss_and_gradients(plain, params, images, seed=3)
    other_value, other_gradients = loss_and_gradients(again, params, images, seed=3)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    for path, gradient in flatten(other_gradients).items():
        np.testing.assert_allclose(
            gradient, flatten(gradients)[path], rtol=1e-5, atol=1e-6, err_msg=path
        )


def test_scan_drops_branches_by_the_rate_of_the_layer():
    options = {"stochastic_depth_rate": 1 - 1e-6}
    model = make_vit(num_classes=5, scan=True, **TINY, **options)
    first = make_vit(num_classes=5, **(TINY | {"num_layers": 1}))
    params, images = init(model)
    got = run(model, params, images, train=True)[1]["encoded"]
    transformer = dict(params["Transformer"])
    transformer["encoderblock_0"] = jax.tree.map(lambda x: x[0], transformer.pop("encoderblock"))
    want = run(first, params | {"Transformer": transformer}, images)[1]["encoded"]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_scanned_blocks_start_with_values_of_their_own():
    model = make_vit(num_classes=5, scan=True, **TINY)
    initialize = jax.jit(functools.partial(model.init, train=False))
    params = initialize(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    kernel = params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert kernel.shape == (2, 16, 32)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    # Xavier's bound is that of one layer, not of the stack.
    assert np.abs(kernel).max() == pytest.approx(np.sqrt(6 / (16 + 32)), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_theta": 0.0}, "model.rope_theta=0.0: expected more than 0"),
        ({"rope_reference_grid": (16, 16)}, "with model.rope_theta=None: expected rows"),
        ({"rope_theta": 9.0, "rope_reference_grid": (0, 4)}, r"rope_reference_grid=\(0, 4\)"),
        ({"rope_theta": 10.0, "hidden_size": 24}, "the 6 channels of a head can't be halved"),
        ({"position_embedding": "sincos2d", "hidden_size": 6, "num_heads": 2}, "a multiple of 4"),
        ({"stochastic_depth_rate": 1.0}, "model.stochastic_depth_rate=1.0: expected 0 <= value"),
        ({"num_registers": -1}, "model.num_registers=-1: expected at least 0"),
        ({"classifier": "unpooled", "norm_after_pooling": True}, "nothing pools"),
        ({"untied_norm": True, "norm_after_pooling": True}, "expected one of them"),
        ({"rope_frequencies": "mixed"}, "'mixed' with model.rope_theta=None"),
        ({**CENTERED, "rope_frequencies": "mixed"}, "expected a rope_theta such as 10.0, rope_coo"),
        ({"rope_coordinates": "centered"}, "with model.rope_theta=None"),
        ({"rope_theta": 9.0, "rope_rescale": 2.0}, "rope_coordinates='centered'"),
        ({**CENTERED, "rope_jitter": 1.0}, "model.rope_jitter=1.0 .* a number above 1"),
        ({**CENTERED, "rope_reference_grid": (4, 4)}, "and no grid"),
        ({**CENTERED, "rope_register_theta": 9.0}, "model.num_registers=0"),
        ({**CENTERED, "rope_register_theta": 9.0, "num_registers": 3}, "that make a square"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_vit(num_classes=2, **(TINY | options))


def test_the_distillation_token_has_a_head_of_its_own():
    model = make_vit(num_classes=5, distillation_token=True, num_registers=1, **TINY)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)), jnp.float32)
    params = random_params(model, images, train=False)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    logits, out = compiled(model)({"params": params}, images, train=False)
    tokens = out["encoded"]
    first, second = (
        tokens[:, i] @ params[name]["kernel"] + params[name]["bias"]
        for i, name in enumerate(("head", "head_dist"))
    )
    np.testing.assert_allclose(out["class_logits"], first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out["distillation_logits"], second, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, (first + second) / 2, rtol=1e-5, atol=1e-5)
    positions = params["Transformer"]["posembed_input"]["pos_embedding"]
    assert tokens.shape[1] == positions.shape[1] + 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("classifier", "gap"), ("representation_size", 4), ("norm_after_pooling", True)],
)
def test_options_that_exclude_a_distillation_token_are_refused(key, value):
    with pytest.raises(UserError, match=rf"model\.distillation_token with model\.{key}={value!r}"):
        make_vit(num_classes=5, distillation_token=True, **TINY, **{key: value})


@pytest.mark.parametrize("positions", ["learned", "sincos2d_mae"])
def test_patches_left_out_are_as_if_no_other_token_saw_them(positions):
    model = make_vit(num_classes=0, position_embedding=positions, rope_theta=100.0, **TINY)
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    params = random_params(model, images, train=False)
    all_patches = jnp.broadcast_to(jnp.arange(6), (2, 6))

    def encode(images, **options):
        return compiled(model)({"params": params}, images, train=True, **options)[1]["encoded"]

    whole, same = encode(images), encode(images, patches=all_patches)
    np.testing.assert_array_equal(same, whole)

    patches = jnp.array([[5, 0], [2, 3]])
    some = encode(images, patches=patches)
    assert some.shape[1] == 1 + 2
    noise = images.copy()  # All pixels but those of the kept patches, of 4x4, change.
    kept = np.zeros((2, 2, 3), bool)
    for i in range(2):
        kept[i].ravel()[np.asarray(patches[i])] = True
    mask = kept.repeat(4, axis=1).repeat(4, axis=2)[..., None]
    noise = np.where(mask, noise, 9.0).astype(np.float32)
    again = encode(noise, patches=patches)
    np.testing.assert_array_equal(again, some)


def test_named_activations_are_not_computed_again():
    def count_products(remat):
        model = make_vit(num_classes=5, **TINY, remat=remat)
        params, images = init(model)

        def loss(params):
            return model.apply({"params": params}, images, train=False)[0].sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    none, full = count_products("none"), count_products("full")
    some = [count_products(f"save:{n}") for n in ("qkv", "attn_out", "mlp_hidden")]
    assert none < full
    assert [full - n > 0 for n in some] == [True, True, True], (none, full, some)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_blocks_that_drop_nothing_draw_nothing_under_remat_either(rate, scan):
    def draws(remat):
        model = make_vit(num_classes=5, **TINY, stochastic_depth_rate=rate, scan=scan, remat=remat)
        images = jnp.zeros((2, 8, 12, 3))
        shapes = jax.eval_shape(functools.partial(model.init, train=False), rng, images)

        def forward(params):
            return model.apply(params, images, train=True, rngs={"dropout": rng})[0]

        return "random_bits" in str(jax.make_jaxpr(forward)(shapes))

    rng = jax.random.key(0)
    assert (draws("none"), draws("full")) == (rate > 0, rate > 0)


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        ("some", "model.remat='some': expected none, dots, full, or such as save:"),
        ("save:mlp_hiden", "'mlp_hiden'; did you mean 'mlp_hidden'"),
        ("offload:", "model.remat='offload:': expected none"),
    ],
)
def test_unknown_remat_is_refused(remat, message):
    with pytest.raises(UserError, match=message):
        make_vit(num_classes=5, **TINY, remat=remat)
