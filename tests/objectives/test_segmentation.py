# SPDX-License-Identifier: Apache-2.0
"""Segmentation: heads on patch tokens, their loss, and windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.variants import make_vit
from vit_jax.objectives.dense import resize_logits, resize_to_masks, slide
from vit_jax.objectives.segmentation import make_segmentation
from vit_jax.optim.base_optimizers import sgd
from vit_jax.optim.optimizer import make_optimizer
from vit_jax.training.step import init_state, train_step
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

SIZES = {"patch_size": 4, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 16}
CLASSES = ("sky", "tree", "car")
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, (6, 8, 12)).astype(np.uint8)
LABELS[:, 2:4] = 255
BATCH = {
    "image": jnp.asarray(RNG.integers(0, 256, (6, 8, 12, 3)), jnp.uint8),
    "label_map": jnp.asarray(LABELS),
}


def make(vit=(), **options):
    model = make_vit(num_classes=0, **SIZES | dict(vit))
    return make_segmentation(
        model=model, pixel_classes=CLASSES, image_shape=(8, 12, 3), head_width=6, **options
    )


def start(objective):
    shapes = jax.eval_shape(objective.init, jax.random.key(0), BATCH)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    random = [jnp.abs(jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype)) for x in leaves]
    return jax.tree.unflatten(tree, random)


def compute_loss(objective, params, batch=BATCH):
    def compute(params, batch):
        augmented = objective.augment(batch, jax.random.key(0))
        return objective.loss(params, augmented, jax.random.key(1))

    return jax.jit(compute)(params, batch)


def predict(objective, params, batch=BATCH):
    return jax.jit(objective.predict)(params, batch)


def upsample(logits, height, width):
    """Bilinear resizing with half-pixel centres and the edge repeated, in float64."""
    for axis, side in ((1, height), (2, width)):
        old = logits.shape[axis]
        at = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        shape = [1] * 4
        shape[axis] = side
        share = (at - low).reshape(shape)
        logits = logits.take(low, axis) * (1 - share) + logits.take(high, axis) * share
    return logits


def cross_entropy(logits, labels):
    """The mean over the pixels with a label, in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -logs[labels != 255][np.arange((labels != 255).sum()), labels[labels != 255]].mean()


def test_logits_are_resized_as_by_half_pixel_centres():
    logits = np.random.default_rng(0).normal(size=(2, 4, 5, 3))
    for size in ((19, 23), (8, 10), (4, 5), (3, 4)):
        resized = resize_logits(jnp.asarray(logits, jnp.float32), size)
        np.testing.assert_allclose(resized, upsample(logits, *size), atol=1e-5)


def test_logits_are_resized_to_each_mask_without_the_padding_of_its_image():
    logits = np.random.default_rng(0).normal(size=(2, 6, 8, 3))
    extent = np.array([[1, 0, 4, 8, 9, 5], [0, 2, 6, 4, 7, 11]], np.int32)
    found = resize_to_masks(jnp.asarray(logits, jnp.float32), jnp.asarray(extent), (10, 12))
    for one, (top, left, rows, columns, height, width) in enumerate(extent):
        part = logits[one : one + 1, top : top + rows, left : left + columns]
        expected = upsample(part, height, width)[0]
        np.testing.assert_allclose(found[one, :height, :width], expected, atol=1e-5)


def test_loss_of_the_linear_head_is_that_of_the_formula():
    objective = make()
    params = start(objective)
    encoded = np.asarray(predict(objective, params)["encoded"], np.float64)
    features = encoded[:, 1:].reshape(6, 2, 3, 8)
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["segmenter"])
    norm, classifier = head["norm"], head["classifier"]

    def find_logits(mean, var):
        x = (features - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
        return upsample(x @ classifier["kernel"] + classifier["bias"], 8, 12)

    trained = find_logits(features.mean((0, 1, 2)), features.var((0, 1, 2)))
    loss, metrics = compute_loss(objective, params)
    np.testing.assert_allclose(loss, cross_entropy(trained, LABELS), rtol=1e-5)
    hits = (trained.argmax(-1) == LABELS)[LABELS != 255].mean()
    np.testing.assert_allclose(metrics["pixel_accuracy"], hits, rtol=1e-5)
    # Predictions take the running statistics.
    probabilities = jax.jit(objective.find_pixels)(params, BATCH["image"])
    np.testing.assert_array_equal(
        probabilities.argmax(-1), find_logits(norm["mean"], norm["var"]).argmax(-1)
    )


def test_running_statistics_follow_the_batch():
    objective = make()
    params = start(objective)
    features = np.asarray(predict(objective, params)["encoded"])[:, 1:].reshape(-1, 8)
    _, metrics = compute_loss(objective, params)
    updated, metrics = objective.update_statistics(params, metrics)
    assert set(metrics) == {"loss", "pixel_accuracy"}
    old, new = params["segmenter"]["norm"], updated["segmenter"]["norm"]
    for name, now in (("mean", features.mean(0)), ("var", features.var(0, ddof=1))):
        np.testing.assert_allclose(new[name], 0.9 * old[name] + 0.1 * now, rtol=1e-4)


@pytest.mark.parametrize(("scan", "remat"), [(False, "full"), (True, "none")])
def test_features_of_several_blocks_are_their_normed_outputs(scan, remat):
    objective = make({"scan": scan, "remat": remat}, layers=2)
    params = start(objective)
    images = objective.normalize(BATCH["image"])
    features, _ = jax.jit(lambda p: objective._encode(p, images, train=False))(params)
    assert features.shape == (6, 2, 3, 16)
    # The first block is the last one of a model of one block.
    short = make_vit(num_classes=0, **SIZES | {"num_layers": 1}, scan=scan)
    shallow = {name: x for name, x in params.items() if name != "segmenter"}
    if scan:
        block = jax.tree.map(lambda x: x[:1], params["Transformer"]["encoderblock"])
        shallow["Transformer"] = shallow["Transformer"] | {"encoderblock": block}
    run = jax.jit(lambda params: short.apply({"params": params}, images, train=False)[1])
    out = run(shallow)["encoded"]
    np.testing.assert_allclose(features[..., :8].reshape(6, 6, 8), out[:, 1:], atol=1e-5)


def test_features_of_several_blocks_have_the_norm_of_the_model():
    objective = make({"norm": "rms_norm"}, layers=2)
    params = start(objective)
    images = objective.normalize(BATCH["image"])
    features, _ = jax.jit(lambda p: objective._encode(p, images, train=False))(params)
    scale = params["Transformer"]["encoder_norm"]["scale"]
    squares = np.square(np.asarray(features).reshape(6, 6, 2, 8) / scale).mean(axis=-1)
    np.testing.assert_allclose(squares, 1, rtol=1e-3)


@pytest.mark.parametrize(("layers", "scan"), [(1, False), (2, False), (2, True)])
def test_losses_and_predictions_take_the_attention_kernel(layers, scan):
    objective = make({"attention": "pallas", "num_heads": 1, "scan": scan}, layers=layers)
    params = jax.eval_shape(objective.init, jax.random.key(0), BATCH)
    batch = BATCH | {"image": BATCH["image"].astype(jnp.float32)}
    loss = jax.make_jaxpr(lambda p: objective.loss(p, batch, jax.random.key(0)))(params)
    found = jax.make_jaxpr(lambda p: objective.find_pixels(p, BATCH["image"]))(params)
    assert "pallas_call" in str(loss)
    assert "pallas_call" in str(found)


@pytest.mark.parametrize(("head", "grid"), [("conv", (2, 3)), ("upsample", (8, 12))])
def test_heads_give_logits_of_their_grid(head, grid):
    objective = make(head=head)
    logits = jax.eval_shape(objective.predict, start(objective), BATCH)["pixel_logits"]
    assert logits.shape == (6, *grid, 3)
    assert logits.dtype == jnp.float32


def train(objective, steps=2):
    optimizer = make_optimizer(base=sgd(), lr=0.1, total_steps=10, freeze=objective.frozen)
    state = first = init_state(
        jax.random.key(0), BATCH, objective=objective, tx=optimizer.tx, ema=False
    )
    step = jax.jit(
        lambda state: train_step(
            state, BATCH, objective=objective, optimizer=optimizer, ema_decay=None, seed=0
        )
    )
    for _ in range(steps):
        state, metrics = step(state)
    return flatten(first.params), flatten(state.params), metrics


def test_a_frozen_backbone_stays_and_the_head_learns():
    before, after, metrics = train(make(freeze_backbone=True, dropout=0.5, flip=0.5))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith("segmenter/")}
    assert np.isfinite(metrics["loss"])


def test_pixels_without_a_label_do_not_count():
    objective = make({"classifier": "map"}, head="upsample")
    params = start(objective)
    other = BATCH | {"image": BATCH["image"].at[:3].set(0)}
    labels = BATCH["label_map"].at[:3].set(255)
    none = BATCH | {"label_map": jnp.full_like(labels, 255)}
    batches = (BATCH | {"label_map": labels}, other | {"label_map": labels}, none)
    losses = [compute_loss(objective, params, batch)[0] for batch in batches]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert losses[2] == 0


def test_flips_move_image_and_map_together():
    objective = make(flip=0.5)
    marked = BATCH["label_map"][..., None].repeat(3, -1)
    batch = objective.augment(BATCH | {"image": marked}, jax.random.key(2))
    back = np.rint((np.asarray(batch["image"]) * 0.5 + 0.5) * 255)
    np.testing.assert_array_equal(back[..., 0], batch["label_map"])
    assert not np.array_equal(batch["label_map"], LABELS)


def test_windows_cover_the_image_and_overlaps_are_averaged():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, 7, 3)), jnp.float32)

    def find_logits(window):
        # The mean of a window tells where it is.
        return window[..., :2] + window.mean(axis=(1, 2, 3), keepdims=True)

    found = jax.jit(lambda images: slide(find_logits, images, (5, 9), (3, 9)))(images)
    total, counts = np.zeros((2, 11, 7, 2)), np.zeros((11, 1, 1))
    for top in (0, 3, 6):
        window = np.asarray(images[:, top : top + 5], np.float64)
        total[:, top : top + 5] += window[..., :2] + window.mean(axis=(1, 2, 3), keepdims=True)
        counts[top : top + 5] += 1
    np.testing.assert_allclose(found, total / counts, atol=1e-5)


def test_images_of_another_size_get_resized_positions():
    objective = make()
    params = start(objective)
    larger = jnp.zeros((1, 16, 24, 3), jnp.uint8)
    whole = jax.eval_shape(lambda p, x: objective.find_pixels(p, x, flip=True), params, larger)
    assert whole.shape == (1, 16, 24, 3)
    options = {"window": (8, 12), "stride": (8, 12)}
    windows = jax.jit(lambda p, x: objective.find_pixels(p, x, **options))(params, larger)
    # Each window of a blank image is the same.
    np.testing.assert_allclose(windows[:, :8, :12], windows[:, 8:, 12:], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, "objective.layers=3: expected 1 to 2"),
        ({"dropout": 1.0}, "objective.dropout=1.0: expected 0 <= value < 1"),
        ({"flip": 2.0}, "objective.flip=2.0: expected 0 to 1"),
        ({"vit": {"patch_dropout_rate": 0.5}}, "model.patch_dropout_rate=0.5: expected 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
