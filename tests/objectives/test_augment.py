# SPDX-License-Identifier: Apache-2.0
"""Distortion on the device: what each does to an image, how often, and the same on any mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import ndimage

from vit_jax.data.ops import colors
from vit_jax.models.variants import make_vit
from vit_jax.objectives.augment import (
    Augmentation,
    blur,
    erase,
    flip_lr,
    jitter_colors,
    three_augment,
)
from vit_jax.objectives.mixing import mixup
from vit_jax.objectives.supervised import make_supervised
from vit_jax.parallel.mesh import batch_sharding, make_mesh
from vit_jax.utils.errors import UserError

KEY = jax.random.key(0)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def supervised(**options):
    model = make_vit(
        num_classes=5, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, mlp_dim=8
    )
    return make_supervised(model=model, num_classes=5, **options)


def augment(batch, **options):
    """The images of an augmented batch."""
    return np.asarray(jax.jit(supervised(**options).augment)(batch, KEY)["image"])


def test_flip_mirrors_a_share_of_the_images():
    images = noise(400, 3, 4, 3)
    flipped = np.asarray(flip_lr(KEY, images, probability=0.25))
    assert flipped.dtype == np.uint8
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    same = (flipped == images).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert 70 < mirrored.sum() < 130


@jax.jit
def jitter(images, strengths):
    return jitter_colors(KEY, images, strengths=strengths)


@pytest.mark.parametrize("which", range(3), ids=["brightness", "contrast", "saturation"])
def test_each_jitter_is_what_the_host_does(which):
    images = noise(64, 6, 5, 3)
    strengths = [0.0, 0.0, 0.0]
    strengths[which] = 0.5
    out = np.asarray(jitter(images.astype(np.float32), tuple(strengths)))
    adjust = (colors.adjust_brightness, colors.adjust_contrast, colors.adjust_saturation)[which]
    factors = []
    for image, result in zip(images, out, strict=True):
        exact = image.astype(float)
        gray = exact @ [0.299, 0.587, 0.114]
        start = (np.zeros_like(gray), np.full_like(gray, gray.mean()), gray)[which][..., None]
        free = (result > 0.1) & (result < 254.9) & (np.abs(exact - start) > 20)
        ratios = (result - start)[free] / (exact - start)[free]
        factors.append(np.median(ratios))
        np.testing.assert_allclose(ratios, factors[-1], atol=1e-4)
        # The host rounds luma, its mean, and cuts fractions off.
        assert np.abs(result - adjust(image, factors[-1])).max() < 2
    assert 0.5 <= min(factors) < 0.6
    assert 1.4 < max(factors) <= 1.5


def test_jitter_goes_in_any_order():
    image = np.array([[[250, 20, 20]]], np.float32)  # clipped at each step, so that order tells
    images = np.repeat(image[None], 600, 0)
    shape = (600, 3)
    strengths = (0.9, 0.9, 0.9)
    out = np.asarray(jitter(images, strengths)).reshape(shape)
    factors = np.asarray(
        jax.random.uniform(jax.random.split(KEY)[0], shape, minval=0.1, maxval=1.9)
    )

    def change(pixel, which, factor):
        gray = pixel @ [0.299, 0.587, 0.114]
        start = 0 if which == 0 else gray  # one pixel: its luma is the mean
        return np.clip(start + factor * (pixel - start), 0, 255)

    orders = set()
    for pixel, (one, two, three) in zip(out, factors, strict=True):
        ways = {
            order: functools.reduce(
                lambda p, i, f=(one, two, three): change(p, i, f[i]), order, image[0, 0]
            )
            for order in itertools.permutations(range(3))
        }
        fits = {o for o, way in ways.items() if np.abs(way - pixel).max() < 0.01}
        assert fits
        orders |= fits if len(fits) == 1 else set()
    assert len(orders) == 6


def test_three_augment_takes_one_of_three():
    images = noise(300, 12, 12, 3).astype(np.float32)
    out = np.asarray(jax.jit(three_augment)(KEY, images))
    gray = (images @ [0.299, 0.587, 0.114])[..., None]
    solarized = np.where(images < 128, images, 255 - images)
    is_gray = np.isclose(out, gray, atol=0.01).all((1, 2, 3))
    is_solarized = (out == solarized).all((1, 2, 3))
    is_blurred = ~is_gray & ~is_solarized
    assert min(is_gray.sum(), is_solarized.sum(), is_blurred.sum()) > 70
    # A blur of deviation 2 leaves little noise, one of 0.1 all of it.
    left = out[is_blurred].std((1, 2, 3)) / images[is_blurred].std((1, 2, 3))
    assert left.min() < 0.2
    assert left.max() > 0.99


def test_blur_is_gaussian():
    images = noise(3, 20, 30, 3).astype(np.float32)
    sigmas = (0.1, 0.8, 2.0)
    out = np.asarray(jax.jit(blur)(images, jnp.array(sigmas)))
    for image, result, sigma in zip(images, out, sigmas, strict=True):
        exact = ndimage.gaussian_filter(
            image.astype(float), sigma, axes=(0, 1), mode="nearest", radius=8
        )
        np.testing.assert_allclose(result, exact, atol=1e-3)


@pytest.fixture(scope="module")
def erased():
    """Where 2,000 images of ones were erased, and the images."""
    images = jnp.ones((2000, 40, 60, 1))
    out = np.asarray(jax.jit(lambda x: erase(KEY, x, probability=0.4, mode="pixel"))(images))
    return (out != 1)[..., 0], out[..., 0]


def test_erasing_fills_one_rectangle_in_a_share_of_the_images(erased):
    mask, _ = erased
    assert mask.any((1, 2)).mean() == pytest.approx(0.4, abs=0.04)
    heights, widths = mask.any(2).sum(1), mask.any(1).sum(1)
    np.testing.assert_array_equal(mask.sum((1, 2)), heights * widths)


def test_erased_areas_aspects_and_places_are_those_of_the_paper(erased):
    mask, _ = erased
    mask = mask[mask.any((1, 2))]
    height, width = mask.any(2).sum(1), mask.any(1).sum(1)
    area, aspect = height * width / 2400, height / width
    # Rounding to whole pixels moves the limits a little.
    assert 0.017 < area.min() < 0.03
    assert 0.3 < area.max() < 0.35
    assert 0.26 < aspect.min() < 0.35
    assert 2.5 < aspect.max() < 3.8
    assert (height < 40).all()
    assert (width < 60).all()
    for used, side, size in ((mask.any(2), 40, height), (mask.any(1), 60, width)):
        place = used.argmax(1) / (side - size)
        assert place.min() == 0
        assert place.max() == 1
        assert place.mean() == pytest.approx(0.5, abs=0.06)


def test_erasing_fills_with_noise_or_with_the_mean(erased):
    mask, out = erased
    assert out[mask].mean() == pytest.approx(0, abs=0.02)
    assert out[mask].std() == pytest.approx(1, abs=0.02)
    images = jnp.ones((20, 16, 16, 3))
    const = np.asarray(jax.jit(lambda x: erase(KEY, x, probability=1.0, mode="const"))(images))
    assert set(np.unique(const)) == {0, 1}
    assert (const == 0).any((1, 2, 3)).all()


def test_colours_change_before_normalisation_and_erasing_comes_after():
    batch = {"image": noise(64, 8, 8, 3), "label": jnp.zeros(64, int)}
    options = {"pixel_mean": [0.4, 0.5, 0.6], "pixel_std": [0.2, 0.3, 0.4]}
    jittered = augment(batch, color_jitter=[0.0, 0.0, 2.0], **options)
    mean, std = (np.array(options[k], np.float32) for k in ("pixel_mean", "pixel_std"))
    pixels = jittered * std + mean
    assert -1e-5 < pixels.min() < 0.001  # clipped
    assert 0.999 < pixels.max() < 1 + 1e-5
    plain = augment(batch, **options)
    erased = augment(batch, random_erasing=1.0, random_erasing_mode="const", **options)
    # Two programs may round differently.
    assert (np.isclose(erased, plain, rtol=0, atol=1e-6) | (erased == 0)).all()
    assert (erased != plain).any((1, 2, 3)).all()


ALL = {
    "flip": 0.5,
    "color_jitter": 0.3,
    "three_augment": True,
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}


@pytest.fixture(scope="module")
def augmented():
    """A batch, how it is augmented, and what one device makes of it."""
    batch = {"image": noise(16, 16, 16, 3), "label": np.arange(16, dtype=np.int32) % 5}
    augment = jax.jit(supervised(**ALL).augment)
    return batch, augment, augment(batch, KEY)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"data": 8}, marks=pytest.mark.slow, id="data8"),
        pytest.param({"data": 1, "fsdp": 4, "tensor": 2}, id="fsdp4-tensor2"),
    ],
)
def test_a_step_has_the_same_batch_on_any_mesh_and_never_leaves_the_device(mesh, augmented):
    batch, augment, want = augmented
    sharding = batch_sharding(make_mesh(**mesh))
    placed = jax.device_put(batch, sharding)
    key = jax.device_put(KEY, NamedSharding(sharding.mesh, PartitionSpec()))
    with jax.transfer_guard("disallow"):
        got = augment(placed, key)
    np.testing.assert_allclose(got["image"], want["image"], atol=1e-6)
    np.testing.assert_array_equal(got["target"], want["target"])
    assert got["image"].sharding.is_equivalent_to(sharding, 4)


def describe(augment):
    """All that is computed when a batch is augmented."""
    batch = {"image": noise(2, 8, 8, 3), "label": np.arange(2)}
    return str(jax.make_jaxpr(augment)(batch, KEY))


def test_what_is_off_costs_nothing():
    def plain(batch, rng):
        images = batch["image"].astype(jnp.float32) / np.float32(127.5) - np.float32(1)
        return {"image": images, "target": jax.nn.one_hot(batch["label"], 5)}

    def labelled(batch, rng):
        return plain(batch, rng) | {"label": batch["label"]}

    assert describe(supervised().augment) == describe(labelled)
    options = {"mixup_switch_prob": 0.3, "random_erasing_mode": "const", "color_jitter": [0, 0, 0]}
    assert describe(supervised(**options).augment) == describe(labelled)

    def mixed(batch, rng):
        batch = plain(batch, rng)
        images, targets = mixup(rng, batch["image"], batch["target"], alpha=0.2)
        return {"image": images, "target": targets}

    assert describe(supervised(mixup=0.2).augment) == describe(mixed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 1.5},
        {"random_erasing": -0.1},
        {"mixup_switch_prob": 2.0},
        {"cutmix": -1.0},
        {"color_jitter": -0.1},
        {"color_jitter": [0.3, 0.3, -0.3]},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=rf"objective\.{next(iter(wrong))}="):
        supervised(**wrong)


def test_augmentation_can_be_hashed_whatever_a_config_holds():
    assert hash(Augmentation(color_jitter=[0.1, 0.2, 0.3]))
    assert Augmentation(color_jitter=[0.1, 0.2, 0.3]).jitter_strengths == (0.1, 0.2, 0.3)
