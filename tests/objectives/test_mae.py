# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoding against plain numpy, and its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.variants import make_vit
from vit_jax.objectives.mae import make_mae, normalize_patches, patchify, unpatchify
from vit_jax.utils.errors import UserError

SIZES = {"patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32}
DECODER = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}


def mae(*, model=None, **options):
    vit = make_vit(
        num_classes=0, **(SIZES | {"position_embedding": "sincos2d_mae"} | (model or {}))
    )
    return make_mae(model=vit, image_shape=(16, 16, 3), **(DECODER | options))


def draw_batch(count=3):
    rng = np.random.default_rng(0)
    return {"image": jnp.asarray(rng.integers(0, 256, (count, 16, 16, 3)), jnp.uint8)}


def test_patches_are_rows_of_pixels_and_come_back():
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    patches = patchify(images, (4, 6))
    np.testing.assert_array_equal(patches[1, 2], images[1, 4:8, :6].ravel())
    np.testing.assert_array_equal(unpatchify(patches, images.shape, (4, 6)), images)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_is_the_mean_squared_error_of_hidden_patches(norm_pix):
    objective, batch = mae(norm_pix=norm_pix), draw_batch()
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    augmented = jax.jit(objective.augment)(batch, jax.random.key(1))
    visible = np.asarray(augmented["visible"])
    assert visible.shape == (3, 4)
    predicted = np.asarray(jax.jit(objective._apply)(params, augmented, rng=None))
    images = np.asarray(batch["image"], np.float64) / 127.5 - 1
    errors = []
    for i in range(3):
        for patch in set(range(16)) - set(visible[i].tolist()):
            row, column = divmod(patch, 4)
            target = images[i, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].ravel()
            if norm_pix:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(((predicted[i, patch] - target) ** 2).mean())
    loss, metrics = jax.jit(objective.loss)(params, augmented, jax.random.key(2))
    assert len(errors) == 3 * 12
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-5)
    assert float(metrics["loss"]) == float(loss)


def test_hidden_pixels_reach_the_loss_only_as_targets():
    """No hidden pixel is seen: the prediction does not change with it."""
    objective, batch = mae(), draw_batch()
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    augmented = jax.jit(objective.augment)(batch, jax.random.key(1))
    before = jax.jit(objective._apply)(params, augmented, rng=None)
    visible = (np.asarray(augmented["visible"])[:, :, None] == np.arange(16)).any(1)
    mask = visible.reshape(3, 4, 4).repeat(4, axis=1).repeat(4, axis=2)[..., None]
    other = np.where(mask, augmented["image"], 0.5)
    after = jax.jit(objective._apply)(params, augmented | {"image": jnp.asarray(other)}, rng=None)
    np.testing.assert_array_equal(before, after)


def test_masks_are_a_function_of_the_key_and_differ_between_images():
    objective, batch = mae(), draw_batch(8)
    one, again, other = (
        jax.jit(objective.augment)(batch, jax.random.key(i))["visible"] for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len({tuple(sorted(row.tolist())) for row in one}) > 1
    assert all(len(set(row.tolist())) == 4 for row in one)


def test_masked_patches_cost_nothing_in_the_encoder():
    def flops(ratio):
        sizes = SIZES | {"hidden_size": 64, "mlp_dim": 256, "num_layers": 4}
        objective, batch = mae(model=sizes, mask_ratio=ratio), draw_batch(4)
        params = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch))
        augmented = jax.eval_shape(lambda: objective.augment(batch, jax.random.key(1)))
        loss = jax.jit(lambda p, b: objective.loss(p, b, jax.random.key(2))[0])
        return loss.lower(params, augmented).compile().cost_analysis()["flops"]

    assert flops(0.75) < 0.5 * flops(0.25)


def test_pictures_show_what_is_seen_and_what_is_predicted():
    objective, batch = mae(mask_ratio=0.5), draw_batch()
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    found, again = (jax.jit(objective.reconstruct)(params, batch) for _ in range(2))
    np.testing.assert_array_equal(found["loss"], again["loss"])
    seen = np.isclose(found["masked"], batch["image"], atol=1e-3)
    assert 0.5 <= seen.mean() < 0.55
    same = np.isclose(found["reconstructed"], batch["image"], atol=1e-3)
    assert same[seen].mean() > 0.95
    hidden = patchify(found["masked"], (4, 4))
    assert np.isclose(hidden, 127.5).all(axis=-1).sum() == 3 * 8
    _, mean, _ = normalize_patches(patchify(found["reconstructed"], (4, 4)))
    assert np.isfinite(mean).all()


def test_whole_images_are_encoded_for_others():
    objective, batch = mae(), draw_batch()
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    out = objective.predict(params, batch)
    assert out["encoded"].shape == (3, 17, 16)
    assert out["pre_logits"].shape == (3, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_ratio": 0.0}, r"objective\.mask_ratio=0\.0: expected above 0"),
        ({"mask_ratio": 1.0}, r"objective\.mask_ratio=1\.0: expected above 0"),
        ({"mask_ratio": 0.99}, "leaves 0 of 16 patches visible"),
        ({"decoder_width": 10, "decoder_heads": 5}, r"objective\.decoder_width=10"),
        ({"decoder_depth": 0}, r"objective\.decoder_depth=0"),
        ({"flip": 2.0}, r"objective\.flip=2\.0"),
        ({"model": {"classifier": "map"}}, "expected model.name='vit'"),
        ({"model": {"patch_dropout_rate": 0.5}}, r"model\.patch_dropout_rate=0\.5"),
        ({"model": {"representation_size": 8}}, r"model\.representation_size=8"),
    ],
)
def test_wrong_values_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        mae(**options)
