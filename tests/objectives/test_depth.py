# SPDX-License-Identifier: Apache-2.0
"""Depth: bins, the scale-invariant loss and its gradient term, by formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.variants import make_vit
from vit_jax.objectives.depth import make_depth
from vit_jax.optim.base_optimizers import sgd
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.training.step import init_state, train_step
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

SIZES = {"patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
RNG = np.random.default_rng(0)
LABELS = RNG.uniform(0.5, 9, (4, 8, 12)).astype(np.float32)
LABELS[:, 2:4], LABELS[0, 6] = 0, 11  # not known, and too far
BATCH = {
    "image": jnp.asarray(RNG.integers(0, 256, (4, 8, 12, 3)), jnp.uint8),
    "label_map": jnp.asarray(LABELS),
}
DEPTH = RNG.uniform(1, 9, LABELS.shape).astype(np.float32)


def make(**options):
    model = make_vit(num_classes=0, **SIZES)
    options = {"pixel_depth": True, "bins": 16, "head_width": 6} | options
    return make_depth(model=model, image_shape=(8, 12, 3), **options)


def pixel_loss(objective, labels, step=200):
    loss, metrics = jax.jit(objective.pixel_loss)(
        {"depth_step": jnp.int32(step)}, DEPTH[..., None], labels
    )
    return float(loss), metrics


def log_errors(labels=LABELS):
    valid = (labels > 0) & (labels <= 10)
    depth, true = DEPTH.astype(np.float64), np.where(valid, labels, 1.0).astype(np.float64)
    return np.where(valid, np.log(depth + 1e-3) - np.log(true + 1e-3), 0), valid


def gradients(error, valid):
    """The loss of differences, in a loop over scales, images and axes."""
    total = 0.0
    for stride in (1, 2, 4, 6):
        found = 0.0
        for e, v in zip(error[:, ::stride, ::stride], valid[:, ::stride, ::stride], strict=True):
            for values, there in ((e, v), (e.T, v.T)):
                for i in range(len(values) - 2):
                    both = there[i] & there[i + 2]
                    found += np.abs(values[i + 2] - values[i])[both].sum()
        total += found / valid[:, ::stride, ::stride].sum()
    return total


def test_a_depth_is_the_mean_of_the_bins():
    logits = RNG.normal(size=(2, 3, 4, 16)).astype(np.float32)
    weights = np.maximum(logits.astype(np.float64), 0) + 0.1
    expected = (weights * np.linspace(1e-3, 10, 16)).sum(-1) / weights.sum(-1)
    found = make().read_logits(jnp.asarray(logits))
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-6)


def test_the_loss_is_that_of_the_valid_pixels_of_the_whole_batch():
    error, valid = log_errors()
    g = error[valid]
    expected = np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    loss, metrics = pixel_loss(make(), LABELS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    squared = (DEPTH.astype(np.float64) - LABELS)[valid] ** 2
    np.testing.assert_allclose(metrics["rmse"], np.sqrt(squared.mean()), rtol=1e-5)
    np.testing.assert_allclose(metrics["known"], valid.mean(), rtol=1e-6)


def test_the_first_steps_take_the_mean_alone():
    error, valid = log_errors()
    alone = np.sqrt(0.15) * abs(error[valid].mean())
    np.testing.assert_allclose(pixel_loss(make(), LABELS, step=99)[0], alone, rtol=1e-4)
    assert pixel_loss(make(), LABELS, step=100)[0] != pytest.approx(alone)
    assert make(mean_steps=0).step_inputs(jnp.int32(0), None) == {}


def test_the_gradient_term_is_added_with_its_weight():
    error, valid = log_errors()
    with_term, without = (pixel_loss(make(gradient_weight=w), LABELS)[0] for w in (0.5, 0.0))
    np.testing.assert_allclose(with_term - without, 0.5 * gradients(error, valid), rtol=1e-4)


def test_a_batch_without_a_depth_has_no_loss_and_no_gradient():
    objective = make(gradient_weight=0.5)

    def loss(outputs):
        params = {"depth_step": jnp.int32(500)}
        return objective.pixel_loss(params, outputs, jnp.zeros_like(LABELS))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(DEPTH[..., None])
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.slow
def test_steps_without_a_depth_are_a_warning():
    objective = make()
    assert not objective.warnings({"known": 0.25})
    (line,) = objective.warnings({"known": 0.0}).values()
    assert "no pixel of these steps has a depth" in line


def test_a_step_trains_and_updates_the_statistics_of_the_head():
    objective = make(freeze_backbone=True, mean_steps=1)
    optimizer = make_optimizer(base=sgd(), lr=0.1, total_steps=10, freeze=objective.frozen)
    state = first = init_state(
        jax.random.key(0), BATCH, objective=objective, tx=optimizer.tx, ema=False
    )
    step = jax.jit(
        lambda state: train_step(
            state, BATCH, objective=objective, optimizer=optimizer, ema_decay=None, seed=0
        )
    )
    for _ in range(2):
        state, metrics = step(state)
    assert {"loss", "rmse"} <= metrics.keys()
    before, after = flatten(first.params), flatten(state.params)
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert changed == {
        *(f"depth_head/classifier/{name}" for name in ("kernel", "bias")),
        *(f"depth_head/norm/{name}" for name in ("mean", "var", "scale", "bias")),
    }


def test_predictions_stay_within_the_limits():
    objective = make(min_depth=2.0, max_depth=3.0)
    found = objective.finish(jnp.asarray([1.0, 2.5, 4.0]))
    np.testing.assert_array_equal(found, [2.0, 2.5, 3.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_depth": False}, "needs the depth of each pixel: expected data with depth images"),
        ({"min_depth": 0.0}, r"min_depth=0.0, objective.max_depth=10.0: expected metres, with 0 <"),
        ({"max_depth": float("inf")}, "max_depth=inf"),
        ({"bins": 1}, "objective.bins=1: expected at least 2"),
        ({"mean_steps": -1}, "objective.mean_steps=-1"),
        ({"gradient_weight": -0.5}, "objective.gradient_weight=-0.5"),
        ({"layers": 2}, "objective.layers=2: expected 1 to 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
