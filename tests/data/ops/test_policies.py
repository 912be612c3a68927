# SPDX-License-Identifier: Apache-2.0
"""Random distortions: which actions policies take, how often, and how far they go."""

from collections import Counter

import cv2
import numpy as np
import pytest

from vit_jax.data.ops import colors, geometry
from vit_jax.data.ops import policies as augment_ops
from vit_jax.data.ops.policies import (
    ACTIONS,
    AUGREG_STYLE,
    AutoAugment,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    RandAug,
    RandAugment,
    Solarize,
    ThreeAugment,
    parse_pairs,
)

GRAY = {"fill": (128, 128, 128), "flag": cv2.INTER_NEAREST}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


IMAGE = cv2.GaussianBlur(noise(64, 48, 3), (5, 5), 2)


def draw(op, count, image=IMAGE):
    rng = np.random.default_rng(0)
    return [op({"image": image}, rng)["image"] for _ in range(count)]


@pytest.fixture
def taken(monkeypatch):
    """The names, shares and styles of the actions that are taken."""
    seen = []
    for name in ACTIONS:
        monkeypatch.setitem(
            ACTIONS, name, lambda image, x, rng, style, n=name: seen.append((n, x, style)) or image
        )
    return seen


# What an action does at a share x of its level of 10: one result, or one for each sign.
LEVELS = {
    ("rotate", 1.5): [geometry.rotate(IMAGE, d, **GRAY) for d in (45, -45)],
    ("shear_x", 1.0): [geometry.shear_x(IMAGE, s, **GRAY) for s in (0.3, -0.3)],
    ("shear_y", 2.0): [geometry.shear_y(IMAGE, s, **GRAY) for s in (0.6, -0.6)],
    ("translate_x", 0.1): [geometry.translate(IMAGE, s, 0, **GRAY) for s in (10, -10)],
    ("translate_y", 0.25): [geometry.translate(IMAGE, 0, s, **GRAY) for s in (25, -25)],
    ("translate_x_relative", 1.0): [
        geometry.translate(IMAGE, s, 0, **GRAY) for s in (0.45 * 48, -0.45 * 48)
    ],
    ("translate_y_relative", 0.5): [
        geometry.translate(IMAGE, 0, s, **GRAY) for s in (0.225 * 64, -0.225 * 64)
    ],
    ("posterize", 0.0): [np.zeros_like(IMAGE)],
    ("posterize", 1.0): [colors.posterize(IMAGE, 4)],
    ("posterize", 2.5): [IMAGE],
    ("posterize_increasing", 0.9): [colors.posterize(IMAGE, 1)],
    ("posterize_original", 0.8): [colors.posterize(IMAGE, 7)],
    ("solarize", 0.0): [255 - IMAGE],
    ("solarize", 0.5): [colors.solarize(IMAGE, 128)],
    ("solarize", 1.5): [IMAGE],
    ("solarize_increasing", 0.75): [colors.solarize(IMAGE, 64)],
    ("solarize_add", 1.5): [colors.solarize_add(IMAGE, 165)],
    ("color", 0.0): [colors.adjust_saturation(IMAGE, 0.1)],
    ("contrast", 1.0): [colors.adjust_contrast(IMAGE, 1.9)],
    ("brightness", 1.5): [colors.adjust_brightness(IMAGE, 2.8)],
    ("sharpness", 0.5): [colors.adjust_sharpness(IMAGE, 1.0)],
    ("color_increasing", 0.5): [colors.adjust_saturation(IMAGE, f) for f in (0.55, 1.45)],
    ("contrast_increasing", 2.0): [colors.adjust_contrast(IMAGE, f) for f in (0.1, 2.8)],
    ("brightness_increasing", 0.0): [IMAGE],
    ("sharpness_increasing", 1.0): [colors.adjust_sharpness(IMAGE, f) for f in (0.1, 1.9)],
    ("autocontrast", 1.0): [colors.autocontrast(IMAGE)],
    ("equalize", 1.0): [colors.equalize(IMAGE)],
    ("invert", 1.0): [255 - IMAGE],
}


@pytest.mark.parametrize(("name", "x"), LEVELS, ids=str)
def test_levels_say_how_far_an_action_goes(name, x):
    rng = np.random.default_rng(0)
    results = {ACTIONS[name](IMAGE, x, rng, AUGREG_STYLE).tobytes() for _ in range(20)}
    assert results == {want.tobytes() for want in LEVELS[name, x]}


def test_every_action_has_its_levels_tested():
    assert {name for name, _ in LEVELS} == ACTIONS.keys() - {"cutout"}


def test_cutout_fills_a_square_anywhere():
    rng = np.random.default_rng(0)
    white = np.full((100, 90, 3), 255, np.uint8)
    cut = [(ACTIONS["cutout"](white, 0.5, rng, AUGREG_STYLE) == 128).all(-1) for _ in range(400)]
    areas = [mask.sum() for mask in cut]
    assert max(areas) == 40 * 40
    assert min(areas) < 22 * 30  # a corner
    # Centres are uniform: a pixel far from the border is in 40 x 40 of the 100 x 90 squares.
    assert np.mean([mask[50, 45] for mask in cut]) == pytest.approx(1600 / 9000, abs=0.05)


def test_randaug_takes_all_of_its_actions_equally_often_at_its_level(taken):
    draw(RandAug(3, 15), 1600)
    names = Counter(name for name, _, _ in taken)
    assert len(taken) == 4800
    assert names.keys() == set(augment_ops.AUGREG_ACTIONS)
    assert len(names) == 16
    assert 240 < min(names.values()) <= max(names.values()) < 360
    assert {(x, style) for _, x, style in taken} == {(1.5, AUGREG_STYLE)}


def test_rand_augment_leaves_out_half_and_draws_levels_up_to_ten(taken):
    draw(RandAugment("rand-m9-mstd0.5-inc1"), 4000)
    assert 3800 < len(taken) < 4200
    names = Counter(name for name, _, _ in taken)
    assert names.keys() == set(augment_ops.DEIT_INCREASING_ACTIONS)
    assert len(names) == 15
    levels = 10 * np.array([x for _, x, _ in taken])
    assert levels.max() == 10
    assert (levels == 10).mean() == pytest.approx(0.0228, abs=0.01)  # two deviations above
    assert np.median(levels) == pytest.approx(9, abs=0.05)
    assert levels.std() == pytest.approx(0.49, abs=0.03)


def test_rand_augment_is_named_by_its_parts(taken):
    draw(RandAugment("rand-m12-n4-mmax20-p1"), 50)
    assert len(taken) == 200
    assert {x for _, x, _ in taken} == {1.2}
    assert {name for name, _, _ in taken} <= set(augment_ops.DEIT_ACTIONS)
    assert not any("increasing" in name for name, _, _ in taken)


@pytest.mark.parametrize(
    "policy", ["m9", "rand-m9-w0", "rand-m", "rand-mstd-1", "rand-p2", "rand-n1.5", "rand-9"]
)
def test_other_names_of_policies_are_refused(policy):
    with pytest.raises(ValueError, match=f"policy='{policy}'"):
        RandAugment(policy)


def test_auto_augment_draws_pairs_evenly_with_their_chances(taken):
    draw(AutoAugment("original"), 5000)
    pairs = parse_pairs("original")
    expected = Counter()
    for pair in pairs:
        for name, probability, level in pair:
            expected[name, level / 10] += probability * 5000 / len(pairs)
    found = Counter((name, x) for name, x, _ in taken)
    assert found.keys() == {k for k, v in expected.items() if v}
    for action, count in found.items():
        assert count == pytest.approx(expected[action], abs=5 * np.sqrt(expected[action]))


@pytest.mark.parametrize(
    ("policy", "first", "last", "probabilities", "levels"),
    [
        (
            "original",
            (("posterize_original", 0.4, 8), ("rotate", 0.6, 9)),
            (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
            31.0,
            287,
        ),
        (
            "v0",
            (("equalize", 0.8, 1), ("shear_y", 0.8, 4)),
            (("color", 0.8, 6), ("rotate", 0.4, 5)),
            29.8,
            240,
        ),
    ],
)
def test_policies_are_the_published_ones(policy, first, last, probabilities, levels):
    pairs = parse_pairs(policy)
    assert len(pairs) == 25
    assert (pairs[0], pairs[-1]) == (first, last)
    actions = [action for pair in pairs for action in pair]
    assert len(actions) == 50
    assert {name for name, _, _ in actions} <= ACTIONS.keys()
    assert sum(p for _, p, _ in actions) == pytest.approx(probabilities)
    assert sum(level for _, _, level in actions) == levels


def test_three_augment_takes_one_of_three_equally_often():
    gray, solarized = colors.grayscale(IMAGE), colors.solarize(IMAGE, 128)
    kinds = Counter(
        "gray" if (out == gray).all() else "solarized" if (out == solarized).all() else "blurred"
        for out in draw(ThreeAugment(), 600)
    )
    assert 160 < min(kinds.values()) <= max(kinds.values()) < 240
    assert len(kinds) == 3


def test_gaussian_blur_draws_deviations_from_its_range(monkeypatch):
    sigmas = []
    monkeypatch.setattr(colors, "blur", lambda image, sigma: sigmas.append(sigma) or image)
    draw(GaussianBlur(0.5, 1.5, 0.25), 2000)
    assert 430 < len(sigmas) < 570
    assert 0.5 <= min(sigmas) < 0.52
    assert 1.48 < max(sigmas) < 1.5
    assert np.mean(sigmas) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        (Grayscale(0.3), colors.grayscale(IMAGE)),
        (Solarize(99, 0.3), colors.solarize(IMAGE, 99)),
    ],
)
def test_an_image_is_changed_with_the_probability(op, changed):
    results = Counter(out.tobytes() for out in draw(op, 1000))
    assert results.keys() == {IMAGE.tobytes(), changed.tobytes()}
    assert 250 < results[changed.tobytes()] < 350


@pytest.mark.parametrize("which", range(3))
def test_color_jitter_draws_factors_about_one(which, monkeypatch):
    name = ("adjust_brightness", "adjust_contrast", "adjust_saturation")[which]
    factors = []
    monkeypatch.setattr(colors, name, lambda image, factor: factors.append(factor) or image)
    strengths = [0, 0, 0]
    strengths[which] = 0.4
    assert all((out == IMAGE).all() for out in draw(ColorJitter(*strengths), 1000))
    assert len(factors) == 1000
    assert 0.6 <= min(factors) < 0.61
    assert 1.39 < max(factors) <= 1.4
    assert np.mean(factors) == pytest.approx(1, abs=0.02)


def test_color_jitter_goes_in_any_order(monkeypatch):
    orders = []
    for name in ("brightness", "contrast", "saturation"):
        monkeypatch.setattr(
            colors, f"adjust_{name}", lambda image, factor, n=name[0]: orders.append(n) or image
        )
    draw(ColorJitter(0.3), 600)
    found = Counter("".join(orders[i : i + 3]) for i in range(0, 1800, 3))
    assert len(found) == 6
    assert min(found.values()) > 70


def test_color_jitter_does_not_go_below_black(monkeypatch):
    factors = []
    monkeypatch.setattr(
        colors, "adjust_brightness", lambda image, factor: factors.append(factor) or image
    )
    draw(ColorJitter(2.0, 0, 0), 500)
    assert 0 <= min(factors) < 0.05
    assert max(factors) > 2.9


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 3)], ids=str)
@pytest.mark.parametrize("name", [*augment_ops.AUGREG_ACTIONS, *augment_ops.DEIT_ACTIONS])
def test_actions_take_images_of_any_shape_and_mirrored_ones(name, shape):
    mirrored = noise(*shape, 3)[:, ::-1]
    before = mirrored.copy()
    for x in (0.0, 1.0, 2.0):
        results = [
            ACTIONS[name](image, x, np.random.default_rng(0), AUGREG_STYLE)
            for image in (mirrored, mirrored.copy())
        ]
        np.testing.assert_array_equal(*results)
        assert results[0].shape == (*shape, 3)
        assert results[0].dtype == np.uint8
    np.testing.assert_array_equal(mirrored, before)


def test_color_jitter_turns_the_hue_with_the_probability(monkeypatch):
    turns = []
    monkeypatch.setattr(colors, "turn_hue", lambda image, share: turns.append(share) or image)
    draw(ColorJitter(0, hue=0.1, probability=0.4), 1000)
    assert 350 < len(turns) < 450
    assert -0.1 <= min(turns) < -0.09
    assert 0.09 < max(turns) <= 0.1
