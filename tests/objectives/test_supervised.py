# SPDX-License-Identifier: Apache-2.0
"""Losses and on-device augmentation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.losses import (
    sigmoid_cross_entropy,
    smooth_labels,
    softmax_cross_entropy,
    top1_hits,
)
from vit_jax.models.variants import make_vit
from vit_jax.objectives.supervised import make_supervised
from vit_jax.utils.errors import UserError

LOGITS = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
TARGETS = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.3, 0.7]])


def test_losses_equal_those_of_optax():
    softmax = optax.softmax_cross_entropy(LOGITS, TARGETS)
    sigmoid = optax.sigmoid_binary_cross_entropy(LOGITS, TARGETS).sum(-1)
    np.testing.assert_allclose(softmax_cross_entropy(LOGITS, TARGETS), softmax, rtol=1e-6)
    np.testing.assert_allclose(sigmoid_cross_entropy(LOGITS, TARGETS), sigmoid, rtol=1e-6)


def test_losses_survive_extreme_logits():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    for loss in (softmax_cross_entropy, sigmoid_cross_entropy):
        assert np.isfinite(loss(logits, TARGETS[:1])).all()
        assert np.isfinite(jax.grad(lambda x, f=loss: f(x, TARGETS[:1]).sum())(logits)).all()


def test_smoothing_spreads_mass_over_all_classes():
    smooth = smooth_labels(TARGETS[:1], 0.3)
    np.testing.assert_allclose(smooth, [[0.8, 0.1, 0.1]], rtol=1e-6)


def supervised(**options):
    model = make_vit(
        num_classes=3, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, mlp_dim=8
    )
    return make_supervised(model=model, num_classes=3, **options)


def test_hits_are_shared_by_classes_that_tie():
    logits = jnp.array([[2.0, 1, 0], [2, 1, 0], [1, 1, 0], [0, 0, 0], [jnp.nan, 1, 0]])
    labels = jnp.array([0, 1, 1, 2, 1])
    np.testing.assert_allclose(top1_hits(logits, labels), [1, 0, 0.5, 1 / 3, 0], rtol=1e-6)
    heads = jnp.stack([logits, logits[:, ::-1]])
    np.testing.assert_allclose(top1_hits(heads, labels)[1], [0, 0, 0.5, 1 / 3, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({}, True),
        ({"loss": "sigmoid", "label_smoothing": 0.1, "random_erasing": 0.5}, True),
        ({"mixup": 0.5}, False),
        ({"cutmix": 1.0}, False),
    ],
)
def test_accuracy_in_training_is_reported_unless_images_are_mixed(options, reported):
    objective = supervised(**options)
    batch = {"image": jnp.ones((4, 8, 8, 3), jnp.uint8), "label": jnp.arange(4) % 3}
    params = objective.init(jax.random.key(0), batch)
    params["head"]["bias"] = jnp.array([0.0, 1.0, 0.0])
    augmented = objective.augment(batch, jax.random.key(1))
    _, metrics = objective.loss(params, augmented, jax.random.key(2))
    assert metrics.keys() == ({"loss", "top1"} if reported else {"loss"})
    if reported:
        assert float(metrics["top1"]) == 0.25
    several = batch | {"label": jnp.eye(3)[batch["label"]]}
    assert "label" not in objective.augment(several, jax.random.key(1))


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, np.log(3)),
        ({"loss": "sigmoid"}, 3 * np.log(2)),
        ({"mixup": 0.5}, np.log(3)),
        ({"cutmix": 1.0, "random_erasing": 0.5, "color_jitter": 0.3}, np.log(3)),
    ],
)
def test_zero_head_starts_at_the_loss_of_a_guess(options, want):
    objective = supervised(**options)
    batch = {"image": jnp.ones((4, 8, 8, 3), jnp.uint8), "label": jnp.arange(4) % 3}
    params = objective.init(jax.random.key(0), batch)
    augmented = objective.augment(batch, jax.random.key(1))
    loss, metrics = objective.loss(params, augmented, jax.random.key(2))
    assert float(loss) == pytest.approx(want, rel=1e-5)
    assert float(metrics["loss"]) == float(loss)
    assert set(objective.predict(params, batch)) == {"encoded", "pre_logits", "logits"}


def test_several_labels_are_targets_as_they_are():
    objective = supervised(loss="sigmoid")
    labels = jnp.array([[1.0, 1.0], [0.0, 0.0]])  # of data with a class less than the model
    batch = {"image": jnp.ones((2, 8, 8, 3), jnp.uint8), "label": labels}
    target = objective.augment(batch, jax.random.key(1))["target"]
    np.testing.assert_array_equal(target, [[1, 1, 0], [0, 0, 0]])


def test_binary_targets_are_of_both_classes_that_are_mixed():
    objective = supervised(loss="sigmoid", mixup=0.8, binary_targets=True)
    batch = {"image": jnp.ones((3, 8, 8, 3), jnp.uint8), "label": jnp.arange(3)}
    target = np.asarray(objective.augment(batch, jax.random.key(1))["target"])
    assert set(target.ravel()) == {0.0, 1.0}
    assert (target.sum(axis=1) == 2).all()
    assert (target.diagonal() == 1).all()


@pytest.mark.parametrize(
    "wrong", [{"loss": "softmax"}, {"loss": "sigmoid", "label_smoothing": 0.1}]
)
def test_binary_targets_need_a_loss_that_takes_them(wrong):
    with pytest.raises(
        UserError, match=r"objective\.binary_targets with .* expected loss='sigmoid'"
    ):
        supervised(binary_targets=True, **wrong)


@pytest.mark.parametrize("wrong", [{"label_smoothing": 1.0}, {"mixup": -0.1}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=f"objective.{next(iter(wrong))}="):
        supervised(**wrong)


def test_pixels_go_from_minus_one_to_one():
    batch = {
        "image": jnp.array([0, 255], jnp.uint8).reshape(2, 1, 1, 1),
        "label": jnp.zeros(2, int),
    }
    images = supervised().augment(batch, jax.random.key(0))["image"]
    np.testing.assert_array_equal(images.ravel(), [-1, 1])


def test_pixels_of_other_weights_have_a_mean_and_a_deviation_for_each_channel():
    objective = supervised(pixel_mean=[0.1, 0.2, 0.3], pixel_std=[0.5, 0.25, 0.125])
    batch = {"image": jnp.full((1, 1, 1, 3), 51, jnp.uint8), "label": jnp.zeros(1, int)}
    images = objective.augment(batch, jax.random.key(0))["image"]
    np.testing.assert_allclose(images.ravel(), [0.1 / 0.5, 0, -0.1 / 0.125], atol=1e-6)
    with pytest.raises(UserError, match=r"objective\.pixel_std="):
        supervised(pixel_std=[0.5, 0.0, 0.5])
    for key, value in (("pixel_mean", [1, 1]), ("pixel_mean", [1] * 4), ("pixel_std", math.nan)):
        with pytest.raises(UserError, match=rf"objective\.{key}=.*: expected a number, or one for"):
            supervised(**{key: value})


WEIGHTS = (1.0, 2.0, 0.5)


def test_class_weights_multiply_the_terms_of_each_class():
    log_p = np.asarray(jax.nn.log_softmax(LOGITS))
    want = -(np.array(WEIGHTS) * np.asarray(TARGETS) * log_p).sum(-1)
    np.testing.assert_allclose(softmax_cross_entropy(LOGITS, TARGETS, WEIGHTS), want, rtol=1e-6)
    p = 1 / (1 + np.exp(-np.asarray(LOGITS, np.float64)))
    targets = np.asarray(TARGETS)
    terms = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    want = (np.array(WEIGHTS) * terms).sum(-1)
    np.testing.assert_allclose(sigmoid_cross_entropy(LOGITS, TARGETS, WEIGHTS), want, rtol=1e-6)


@pytest.mark.parametrize("from_file", [False, True])
def test_class_weights_reach_the_loss(from_file, tmp_path):
    file = tmp_path / "weights.txt"
    file.write_text("1\n2\n0.5\n")
    objective = supervised(class_weights=str(file) if from_file else list(WEIGHTS))
    batch = {"image": jnp.ones((3, 8, 8, 3), jnp.uint8), "label": jnp.arange(3)}
    params = objective.init(jax.random.key(0), batch)
    augmented = objective.augment(batch, jax.random.key(1))
    loss, _ = objective.loss(params, augmented, jax.random.key(2))
    assert float(loss) == pytest.approx(np.log(3) * np.mean(WEIGHTS), rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ((1.0, 2.0), "2 weights; expected one for each of 3"),
        ((1.0, -2.0, 1.0), "at least 0"),
        ((0.0, 0.0, 0.0), "not all 0"),
        ("nowhere.txt", "one number a line"),
    ],
)
def test_wrong_class_weights_are_refused(wrong, words):
    with pytest.raises(UserError, match=rf"objective\.class_weights.*{words}"):
        supervised(class_weights=wrong)


def test_head_starts_with_the_bias_given():
    model = make_vit(
        num_classes=3,
        patch_size=4,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        mlp_dim=8,
        head_bias_init=-6.9,
    )
    objective = make_supervised(model=model, num_classes=3, loss="sigmoid")
    batch = {"image": jnp.ones((2, 8, 8, 3), jnp.uint8), "label": jnp.arange(2)}
    params = objective.init(jax.random.key(0), batch)
    np.testing.assert_array_equal(params["head"]["bias"], np.float32(-6.9))
    loss, _ = objective.loss(params, objective.augment(batch, jax.random.key(1)), jax.random.key(2))
    assert float(loss) == pytest.approx(6.9 + 3 * np.log1p(np.exp(-6.9)), rel=1e-5)
