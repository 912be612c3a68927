# SPDX-License-Identifier: Apache-2.0
"""Losses and targets of self-distillation: those of the code of DINOv2, and float64 formulas."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.objectives.ssl_losses import (
    centered_targets,
    crop_losses,
    gram_loss,
    koleo_loss,
    patch_loss,
    sinkhorn_targets,
)

GOLDEN = Path(__file__).parents[1] / "testdata" / "dino"


def load(case):
    with np.load(GOLDEN / f"{case}_io.npz") as file:
        return dict(file), json.loads((GOLDEN / f"{case}.json").read_text())


def crops(x, count):
    """Rows that are ordered crop by crop, as `[batch, crops, prototypes]`."""
    return np.swapaxes(x.reshape(count, -1, x.shape[-1]), 0, 1)


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
def test_sinkhorn_is_that_of_dinov2(iterations):
    io, spec = load("dino_loss")
    got = sinkhorn_targets(io["teacher_logits"], spec["teacher_temp"], iterations=iterations)
    np.testing.assert_allclose(got, io[f"sinkhorn_{iterations}"], rtol=2e-5, atol=1e-6)


def test_sinkhorn_leaves_rows_out_that_do_not_count():
    scores = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    valid = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], bool)
    got = np.asarray(sinkhorn_targets(scores, 0.1, valid=jnp.asarray(valid)))
    want = sinkhorn_targets(scores[valid], 0.1)
    np.testing.assert_allclose(got[valid], want, rtol=1e-5)
    assert not got[~valid].any()


def test_sinkhorn_overflows_at_no_temperature():
    scores = 50 * np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    got = np.asarray(sinkhorn_targets(scores, 0.01))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-3)


def test_centers_are_those_of_dinov2():
    io, spec = load("dino_loss")
    center = np.zeros(spec["prototypes"], np.float32)
    batches = ("teacher_logits", "teacher_logits_step1", "teacher_logits_step2")
    for step, batch in enumerate(batches):
        np.testing.assert_allclose(center, io[f"center_used_step{step}"][0], atol=1e-6)
        got = centered_targets(io[batch], center, spec["teacher_temp"])
        np.testing.assert_allclose(got, io[f"centered_step{step}"], rtol=1e-4, atol=1e-6)
        center = 0.9 * center + 0.1 * io[batch].mean(axis=0)


def test_crop_losses_and_their_gradients_are_those_of_dinov2():
    io, spec = load("dino_loss")
    # Swapped there; each crop is compared with the other one here.
    targets = crops(io["sinkhorn_3"], 2)[:, ::-1]
    students = crops(io["student_global_logits"], 2), crops(io["student_local_logits"], 4)

    def loss(scores):
        parts = crop_losses(targets, *scores, spec["student_temp"])
        return sum(parts), parts

    (_, parts), grads = jax.value_and_grad(loss, has_aux=True)(students)
    np.testing.assert_allclose(parts[0], io["dino_global_loss"], rtol=1e-5)
    np.testing.assert_allclose(parts[1], io["dino_local_loss"], rtol=1e-5)
    for grad, count, name in zip(grads, (2, 4), ("global", "local"), strict=True):
        want = crops(io[f"grad_student_{name}"], count)
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


def test_crop_losses_are_a_mean_over_pairs():
    """In float64: all pairs weigh the same, and no crop learns from its own target."""
    rng = np.random.default_rng(1)
    targets = rng.dirichlet(np.ones(5), (3, 2))
    scores = [rng.normal(size=(3, n, 5)) for n in (2, 3)]

    def cross_entropy(target, score):
        logits = score / 0.1
        return -(target * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1).mean()

    terms = [cross_entropy(targets[:, t], scores[0][:, 1 - t]) for t in (0, 1)]
    terms += [cross_entropy(targets[:, t], scores[1][:, i]) for t in (0, 1) for i in range(3)]
    got = crop_losses(jnp.asarray(targets), jnp.asarray(scores[0]), jnp.asarray(scores[1]), 0.1)
    np.testing.assert_allclose(got[0], sum(terms[:2]) / 8, rtol=1e-5)
    np.testing.assert_allclose(got[1], sum(terms[2:]) / 8, rtol=1e-5)
    alone = crop_losses(jnp.asarray(targets), jnp.asarray(scores[0]), None, 0.1)
    np.testing.assert_allclose(alone[0], sum(terms[:2]) / 2, rtol=1e-5)
    assert alone[1] == 0


def test_patch_loss_and_its_gradient_are_those_of_dinov2():
    io, spec = load("ibot_loss")
    targets = sinkhorn_targets(io["teacher_logits"], spec["teacher_temp"])
    np.testing.assert_allclose(targets, io["sinkhorn_3"], rtol=2e-5, atol=1e-6)

    def loss(scores, targets=targets):
        weights, images = io["masks_weight"], spec["images"]
        return patch_loss(targets, scores, weights, spec["student_temp"], images=images)

    value, grad = jax.value_and_grad(loss)(io["student_logits"])
    np.testing.assert_allclose(value, io["ibot_loss_raw"], rtol=1e-5)
    np.testing.assert_allclose(grad, io["grad_student"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["", "_b"])
def test_koleo_and_its_gradient_are_those_of_dinov2(part):
    io, _ = load("koleo_loss")
    value, grad = jax.value_and_grad(koleo_loss)(io["x" + part])
    np.testing.assert_allclose(value, io["loss" + part], rtol=1e-5)
    np.testing.assert_allclose(grad, io["grad" + part], rtol=1e-4, atol=1e-6)


def test_equal_images_have_a_finite_koleo_loss():
    same = jnp.ones((2, 4))
    assert koleo_loss(same) == pytest.approx(-np.log(3e-8), rel=1e-3)
    assert np.isfinite(jax.grad(koleo_loss)(same)).all()


def test_gram_loss_compares_cosines_among_patches():
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(2, 6, 4)) for _ in range(2))

    def cosines(x):
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return x @ x.transpose(0, 2, 1)

    want = ((cosines(student) - cosines(teacher)) ** 2).mean()
    got, grads = jax.value_and_grad(gram_loss, argnums=(0, 1))(
        jnp.asarray(student), jnp.asarray(teacher)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.any(grads[0])
    assert not np.any(grads[1])
