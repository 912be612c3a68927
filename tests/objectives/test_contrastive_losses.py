# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses against values of big_vision, and against each other on meshes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.objectives.contrastive_losses import (
    ring_sigmoid_loss,
    sigmoid_loss,
    softmax_loss,
    top1_within_batch,
)
from vit_jax.parallel.mesh import batch_sharding, make_mesh

GOLDEN = np.load(Path(__file__).parent.parent / "testdata/contrastive/contrastive_losses_io.npz")
MESHES = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


def mesh_of(name):
    sizes = MESHES[name]
    count = int(np.prod(list(sizes.values())))
    return make_mesh(**sizes, devices=jax.devices()[:count])


def differentiate(loss, arguments, mesh=None):
    """The loss, its metrics and its gradients, jitted; rows are sharded over the mesh."""
    arguments = [jnp.asarray(x, jnp.float32) for x in arguments]
    if mesh is not None:
        rows = batch_sharding(mesh)
        arguments = [jax.device_put(x, rows) if x.ndim else x for x in arguments]
    grad = jax.value_and_grad(loss, argnums=tuple(range(len(arguments))), has_aux=True)
    (value, metrics), grads = jax.jit(grad)(*arguments)
    return float(value), {k: float(v) for k, v in metrics.items()}, grads


def on_mesh(loss, mesh):
    return functools.partial(loss, mesh=mesh)


FORMS = {
    "gathered": sigmoid_loss,
    "ring on 1": on_mesh(ring_sigmoid_loss, mesh_of("one")),
    "ring on 8": on_mesh(ring_sigmoid_loss, mesh_of("data")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [False, True], ids=["", "at_init"])
def test_sigmoid_loss_and_gradients_are_those_of_big_vision(form, start):
    t, b = (np.log(10), -10.0) if start else (GOLDEN["t_prime"], GOLDEN["b"])
    loss, _, grads = differentiate(FORMS[form], (GOLDEN["zimg"], GOLDEN["ztxt"], t, b))
    end = "_at_init" if start else ""
    assert loss == pytest.approx(GOLDEN[f"siglip_loss{end}"], rel=1e-6)
    for name, grad in zip(("zimg", "ztxt", "t_prime", "b"), grads, strict=True):
        if f"siglip_grad_{name}{end}" in GOLDEN:
            want = GOLDEN[f"siglip_grad_{name}{end}"]
            np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_vectors_before_they_are_normalised(form):
    def loss(zimg, ztxt):
        unit = (z / (jnp.linalg.norm(z, axis=1, keepdims=True) + 1e-8) for z in (zimg, ztxt))
        return FORMS[form](*unit, GOLDEN["t_prime"], GOLDEN["b"])

    value, _, grads = differentiate(loss, (GOLDEN["zimg_raw"], GOLDEN["ztxt_raw"]))
    assert value == pytest.approx(GOLDEN["siglip_raw_loss"], rel=1e-6)
    for name, grad in zip(("zimg", "ztxt"), grads, strict=True):
        want = GOLDEN[f"siglip_raw_grad_{name}"]
        np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6, err_msg=name)


def test_softmax_loss_and_gradients_are_those_of_big_vision():
    arguments = (GOLDEN["zimg"], GOLDEN["ztxt"], GOLDEN["clip_t_prime"])
    loss, _, grads = differentiate(softmax_loss, arguments)
    assert loss == pytest.approx(GOLDEN["clip_loss"], rel=1e-6)
    for name, grad in zip(("zimg", "ztxt", "t_prime"), grads, strict=True):
        np.testing.assert_allclose(grad, GOLDEN[f"clip_grad_{name}"], rtol=1e-5, atol=1e-6)


def draw_pairs(count=16, width=12):
    """Unit vectors of images and of texts that are near them, two texts of which are equal."""
    rng = np.random.default_rng(0)
    zimg, noise = rng.normal(size=(2, count, width))
    ztxt = zimg + noise
    ztxt[count - 1] = ztxt[0]
    return [(z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32) for z in (zimg, ztxt)]


# The others are parts of "all".
FAST = (("ring", "data"), ("sigmoid", "all"), ("ring", "all"), ("softmax", "all"))


@pytest.mark.parametrize(
    ("loss", "mesh"),
    [
        pytest.param(loss, mesh, marks=[pytest.mark.slow] * ((loss, mesh) not in FAST))
        for loss in ("sigmoid", "ring", "softmax")
        for mesh in MESHES
    ],
)
def test_losses_and_gradients_are_equal_on_any_mesh(loss, mesh):
    t, b = np.log(9), -3.0
    make = {"sigmoid": sigmoid_loss, "ring": ring_sigmoid_loss, "softmax": softmax_loss}[loss]
    arguments = (*draw_pairs(), t) if loss == "softmax" else (*draw_pairs(), t, b)
    reference = softmax_loss if loss == "softmax" else sigmoid_loss
    want, want_metrics, want_grads = differentiate(reference, arguments)
    mesh = mesh_of(mesh)
    got, metrics, grads = differentiate(on_mesh(make, mesh), arguments, mesh)
    assert got == pytest.approx(want, rel=1e-6)
    assert metrics == pytest.approx(want_metrics)
    assert 0 < metrics["image_to_text_top1"] < 1
    for grad, want_grad in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-6)


def test_a_ring_holds_a_block_of_logits_a_device_and_the_gathered_form_a_row_of_them():
    mesh, count = mesh_of("data"), 1024
    rows = batch_sharding(mesh)
    vectors = jax.ShapeDtypeStruct((count, 8), jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    sizes = {}
    for name, loss in (("gathered", sigmoid_loss), ("ring", ring_sigmoid_loss)):
        grad = jax.grad(on_mesh(loss, mesh), argnums=(0, 1, 2, 3), has_aux=True)
        compiled = jax.jit(grad).lower(vectors, vectors, scalar, scalar).compile()
        sizes[name] = compiled.memory_analysis().temp_size_in_bytes
    block = 4 * (count // 8) ** 2
    assert sizes["ring"] < 12 * block
    assert sizes["gathered"] > 8 * block


def test_equal_pairs_share_the_hit_within_a_batch():
    similarities = jnp.asarray([[1.0, 1.0, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 3.0]])
    metrics = top1_within_batch(similarities)
    # The first image has two best texts, the second one has a wrong one; columns are (.5, .5, 1).
    assert float(metrics["image_to_text_top1"]) == pytest.approx((0.5 + 0 + 1) / 3)
    assert float(metrics["text_to_image_top1"]) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_a_bad_scale_gives_the_loss_that_it_has():
    """Nothing overflows where a logit is far from 0: the loss is linear there."""
    zimg, ztxt = draw_pairs()
    for form in FORMS.values():
        loss, _, grads = differentiate(form, (zimg, ztxt, np.log(1e4), 0.0))
        assert np.isfinite(loss)
        assert all(np.isfinite(g).all() for g in grads)
