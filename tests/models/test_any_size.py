# SPDX-License-Identifier: Apache-2.0
"""Images of any size: alone, padded, and several in a row, they give equal outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.compiled import compiled
from tests.models.random_params import random_params
from vit_jax.models import attention, attention_tpu
from vit_jax.models.attention import fused_attention
from vit_jax.models.attention_tpu import tpu_attention
from vit_jax.models.patches import PatchBatch, Segments
from vit_jax.models.variants import make_vit
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 24, "num_classes": 5}
GRIDS = [(2, 5), (4, 4), (1, 3)]
PATCH = 2
TABLE = {"posemb_grid": (3, 4)}
POOLED = {
    "gap": {"classifier": "gap", **TABLE},
    "map": {"classifier": "map", **TABLE},
    "map, factorized": {"classifier": "map", "position_embedding": "factorized", **TABLE},
    "gap, rotary": {
        **{"classifier": "gap", "position_embedding": "none", "rope_theta": 100.0},
        "rope_reference_grid": (4, 4),
    },
    "gap, upper left": {"classifier": "gap", "posemb_keep_aspect": True, **TABLE},
}
OPTIONS = POOLED | {
    "token, registers": {"classifier": "token", "num_registers": 2, **TABLE},
    "token, gap": {"classifier": "token_gap", **TABLE},
    "gap, norm behind": {"classifier": "gap", "norm_after_pooling": True, "scan": True, **TABLE},
}


def draw_images(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows * PATCH, columns * PATCH, 3) for rows, columns in GRIDS]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def cut(image):
    rows, columns = (side // PATCH for side in image.shape[:2])
    patches = image.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2)
    return patches.reshape(-1, PATCH, PATCH, 3)


def pad(images, tokens, fill=0.0):
    rows = np.full((len(images), tokens, PATCH, PATCH, 3), fill, np.float32)
    for row, image in zip(rows, images, strict=True):
        patches = cut(image)
        row[: len(patches)] = patches
    return PatchBatch.of_images(jnp.asarray(rows), jnp.asarray(GRIDS, jnp.int32))


def pack(images, order, tokens):
    """One row with images in an order, and room for one image that is absent."""
    pixels = np.zeros((1, tokens, PATCH, PATCH, 3), np.float32)
    coordinates = np.zeros((1, tokens, 2), np.int32)
    segments = np.zeros((1, tokens), np.int32)
    grids = np.ones((1, len(order) + 1, 2), np.int32)
    start = 0
    for number, index in enumerate(order):
        patches, (rows, columns) = cut(images[index]), GRIDS[index]
        stop = start + len(patches)
        pixels[0, start:stop] = patches
        coordinates[0, start:stop] = np.indices((rows, columns)).reshape(2, -1).T
        segments[0, start:stop] = number + 1
        grids[0, number] = rows, columns
        start = stop
    return PatchBatch(*map(jnp.asarray, (pixels, coordinates, grids, segments)))


def make(options):
    model = make_vit(patch_size=PATCH, **SMALL, **options)
    params = random_params(model, jnp.zeros((1, 6, 8, 3)), train=False)
    return model, params


def apply(model, params, inputs):
    return compiled(model)({"params": params}, inputs, train=False)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_image_alone_and_padded_give_equal_outputs(options):
    (model, params), images = make(options), draw_images()
    alone = np.concatenate([apply(model, params, image[None]) for image in images])
    padded = apply(model, params, pad(images, 18))
    np.testing.assert_allclose(padded, alone, atol=1e-5)
    # What padding holds does not matter.
    np.testing.assert_array_equal(apply(model, params, pad(images, 18, fill=3.0)), padded)


def test_weights_of_packed_rows_can_be_asked_for(kernels):
    model, params = make(POOLED["map"])
    for kind in ("fused", "pallas"):
        ask = functools.partial(
            model.clone(attention=kind).apply, train=False, mutable=["intermediates"]
        )
        row = pack(draw_images(), [0, 1, 2], 31)
        _, seen = jax.eval_shape(ask, {"params": params}, row)
        weights = [v for k, v in flatten(seen["intermediates"]).items() if "encoderblock" in k]
        assert [w.shape for w in weights] == [(1, 2, 31, 31)] * 2
        assert not kernels


@pytest.mark.parametrize("options", POOLED.values(), ids=POOLED)
def test_an_image_is_the_same_whatever_shares_its_row(options):
    (model, params), images = make(options), draw_images()
    alone = np.concatenate([apply(model, params, image[None]) for image in images])
    for order in ([0, 1, 2], [2, 0, 1]):
        packed = apply(model, params, pack(images, order, 32))
        assert packed.shape == (4, 5)
        np.testing.assert_allclose(packed[:3], alone[order], atol=1e-5)
        assert np.isfinite(packed).all()


@pytest.fixture
def kernels(monkeypatch):
    """On a CPU a formula takes the place of one kernel, and the other is emulated.

    Collects their names, with the number of tokens.
    """
    calls = []

    def fused(query, *arrays, **options):
        calls.append(("fused", query.shape[1]))
        return fused_attention(query, *arrays, **options, implementation="xla")

    def pallas(query, *arrays, **options):
        calls.append(("pallas", query.shape[1]))
        return tpu_attention(query, *arrays, **options, interpret=True)

    monkeypatch.setattr(attention, "fused_attention", fused)
    monkeypatch.setattr(attention_tpu, "tpu_attention", pallas)
    return calls


def test_gradients_of_packed_images_are_those_of_the_images_alone(kernels):
    (model, params), images = make({**POOLED["map"], "scan": True}), draw_images()
    weights = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)

    def loss(params, batches, model=model):
        logits = jnp.concatenate([apply(model, params, batch) for batch in batches])
        return jnp.sum(logits[:3] * weights)

    want = jax.jit(jax.grad(loss))(params, [image[None] for image in images])
    assert not kernels
    # cuDNN takes an even number of tokens.
    for kind, length in (("xla", None), ("fused", 32), ("pallas", 31)):
        of_kind = functools.partial(loss, model=model.clone(attention=kind))
        got = jax.jit(jax.grad(of_kind))(params, [pack(images, [0, 1, 2], 31)])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got, want)
        assert set(kernels) == (set() if length is None else {(kind, length)})
        kernels.clear()


def test_a_kernel_attends_to_the_tokens_before_padding():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(3, 8, 2, 8)), jnp.bfloat16) for _ in range(3))
    ids = jnp.asarray([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6], jnp.int32)
    segments = Segments(ids, 1)
    got = fused_attention(query, key, value, length=segments.lengths(), implementation="xla")
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32) / 8**0.5
    scores = jnp.where(segments.mask()[:, None], scores, -1e30)
    want = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value.astype(jnp.float32))
    valid, given = np.asarray(ids > 0), np.asarray(got.astype(jnp.float32))
    np.testing.assert_allclose(given[valid], np.asarray(want)[valid], atol=0.03)


def test_padding_attends_to_itself_so_that_no_weight_is_undefined():
    segments = Segments(jnp.asarray([[1, 1, 2, 0, 0]]), 3)
    assert np.asarray(segments.mask()).any(axis=2).all()
    assert np.asarray(segments.members())[0].sum(axis=1).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("options", "packed", "words"),
    [
        ({}, False, "need a model.posemb_grid"),
        ({**TABLE, "patch_dropout_rate": 0.5}, False, "patch_dropout_rate=0"),
        ({**TABLE, "classifier": "token"}, True, "classifier='gap' or 'map'"),
        ({**TABLE, "classifier": "gap", "num_registers": 1}, True, "without registers"),
    ],
)
def test_models_that_do_not_take_rows_of_patches_are_refused(options, packed, words):
    model = make_vit(patch_size=PATCH, **SMALL, **options)
    with pytest.raises(UserError, match=words):
        model.check_rows(packed=packed)
