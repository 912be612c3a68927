# SPDX-License-Identifier: Apache-2.0
"""Operations that distort an image at random, and the published policies that combine them.

A policy picks actions from a table. The strength of an action is a level from 0 to 10, here as a
fraction x from 0 to 1. Policies also differ in style: the fill colour and the interpolation. All
operations return an image of the shape and dtype that they take, uint8 `[height, width, 3]`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import cv2
import numpy as np

from vit_jax.data.ops import augreg, colors, geometry, pillow
from vit_jax.data.ops.geometry import Fill
from vit_jax.data.ops.transforms import Features, Op, Random, Transform, check_order


@dataclasses.dataclass(frozen=True)
class Style:
    """Fill colour of pixels from outside of the image, and operations that move pixels.

    The operations take an image and how far it goes, as the functions of `geometry` do.
    """

    fill: Fill
    rotate: Callable
    shear_x: Callable
    shear_y: Callable
    translate: Callable


def _make_style(module: Any, fill: Fill, **options: Any) -> Style:
    functions = (module.rotate, module.shear_x, module.shear_y, module.translate)
    return Style(fill, *(functools.partial(f, fill=fill, **options) for f in functions))


# arXiv:2106.10270, and the code of arXiv:1909.13719.
_GRAY = (128, 128, 128)
AUGREG_STYLE = _make_style(geometry, _GRAY, flag=cv2.INTER_NEAREST)
AUGREG_PUBLISHED_STYLE = _make_style(augreg, _GRAY)
# DeiT (arXiv:2012.12877) and later work fill with the mean colour of ImageNet.
_MEAN = (124, 116, 104)
DEIT_STYLE = _make_style(geometry, _MEAN, flag=cv2.INTER_LINEAR)
TIMM_STYLE = _make_style(pillow, _MEAN)

Action = Callable[[np.ndarray, float, np.random.Generator, Style], np.ndarray]


def _either_sign(x: float, rng: np.random.Generator) -> float:
    return -x if rng.random() < 0.5 else x


def _enhance(adjust: Callable) -> Action:
    return lambda image, x, *_: adjust(image, 0.1 + 1.8 * x)


def _enhance_about_one(adjust: Callable) -> Action:
    return lambda image, x, rng, _: adjust(image, max(0.1, 1 + _either_sign(0.9 * x, rng)))


def _rotate(image: np.ndarray, x: float, rng: np.random.Generator, style: Style) -> np.ndarray:
    return style.rotate(image, _either_sign(30 * x, rng))


def _shear_x(image: np.ndarray, x: float, rng: np.random.Generator, style: Style) -> np.ndarray:
    return style.shear_x(image, _either_sign(0.3 * x, rng))


def _shear_y(image: np.ndarray, x: float, rng: np.random.Generator, style: Style) -> np.ndarray:
    return style.shear_y(image, _either_sign(0.3 * x, rng))


def _translate(image: np.ndarray, pixels: float, rng: np.random.Generator, style: Style, axis: str):
    pixels = _either_sign(pixels, rng)
    x, y = (pixels, 0) if axis == "x" else (0, pixels)
    return style.translate(image, x, y)


def _cut_out(image: np.ndarray, x: float, rng: np.random.Generator, style: Style) -> np.ndarray:
    row, column = (int(rng.integers(side)) for side in image.shape[:2])
    return geometry.cut_out(image, row, column, int(40 * x), fill=style.fill)


_ENHANCE = {
    "color": colors.adjust_saturation,
    "contrast": colors.adjust_contrast,
    "brightness": colors.adjust_brightness,
    "sharpness": colors.adjust_sharpness,
}
# "..._increasing" actions are stronger at higher levels; "posterize_original" is the paper's.
ACTIONS: dict[str, Action] = {
    "autocontrast": lambda image, *_: colors.autocontrast(image),
    "equalize": lambda image, *_: colors.equalize(image),
    "invert": lambda image, *_: colors.invert(image),
    "rotate": _rotate,
    "posterize": lambda image, x, *_: colors.posterize(image, min(8, int(4 * x))),
    "posterize_increasing": lambda image, x, *_: colors.posterize(image, max(0, 4 - int(4 * x))),
    "posterize_original": lambda image, x, *_: colors.posterize(image, min(8, 4 + int(4 * x))),
    "solarize": lambda image, x, *_: colors.solarize(image, int(256 * x)),
    "solarize_increasing": lambda image, x, *_: colors.solarize(image, 256 - int(256 * x)),
    "solarize_add": lambda image, x, *_: colors.solarize_add(image, int(110 * x)),
    **{name: _enhance(adjust) for name, adjust in _ENHANCE.items()},
    **{f"{name}_increasing": _enhance_about_one(adjust) for name, adjust in _ENHANCE.items()},
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": lambda image, x, rng, style: _translate(image, 100 * x, rng, style, "x"),
    "translate_y": lambda image, x, rng, style: _translate(image, 100 * x, rng, style, "y"),
    "translate_x_relative": lambda image, x, rng, style: _translate(
        image, 0.45 * x * image.shape[1], rng, style, "x"
    ),
    "translate_y_relative": lambda image, x, rng, style: _translate(
        image, 0.45 * x * image.shape[0], rng, style, "y"
    ),
    "cutout": _cut_out,
}
# What published code computes in another way: see `augreg`, and timm at levels above 11.
AUGREG_COLORS: dict[str, Action] = {
    "autocontrast": lambda image, *_: augreg.autocontrast(image),
    "posterize": lambda image, x, *_: augreg.posterize(image, int(4 * x)),
    "solarize": lambda image, x, *_: augreg.solarize(image, int(256 * x)),
    "color": _enhance(augreg.adjust_saturation),
    "contrast": _enhance(augreg.adjust_contrast),
    "sharpness": _enhance(augreg.adjust_sharpness),
}
TIMM_COLORS: dict[str, Action] = {
    "solarize_add": lambda image, x, *_: colors.solarize_add(image, min(128, int(110 * x))),
}

_COMMON = ("autocontrast", "equalize", "invert", "rotate", "shear_x", "shear_y", "solarize_add")
_TONES = ("posterize", "solarize", *_ENHANCE)
AUGREG_ACTIONS = (*_COMMON, *_TONES, "translate_x", "translate_y", "cutout")
DEIT_ACTIONS = (*_COMMON, *_TONES, "translate_x_relative", "translate_y_relative")
DEIT_INCREASING_ACTIONS = tuple(
    f"{name}_increasing" if name in _TONES else name for name in DEIT_ACTIONS
)


@dataclasses.dataclass(frozen=True)
class RandAug(Random):
    """Applies `num_layers` of sixteen actions at level `magnitude`, which may be above 10.

    The definition is AugReg's (arXiv:2106.10270), after arXiv:1909.13719: no action is skipped by
    chance, and `magnitude` 0 still changes the image. `variant` "pillow" has the actions that the
    papers describe, in which Pillow's functions are; "augreg" those of the published code, with
    its faults, see `augreg`.
    """

    num_layers: int
    magnitude: float
    variant: Literal["pillow", "augreg"] = "pillow"
    may_be_zero = ("magnitude",)

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        published = self.variant == "augreg"
        actions = ACTIONS | AUGREG_COLORS if published else ACTIONS
        style = AUGREG_PUBLISHED_STYLE if published else AUGREG_STYLE
        for _ in range(self.num_layers):
            action = actions[AUGREG_ACTIONS[rng.integers(len(AUGREG_ACTIONS))]]
            image = action(image, self.magnitude / 10, rng, style)
        return image


# Policies that move pixels by OpenCV's bilinear interpolation, or as timm does by default for
# DeiT: by Pillow's bicubic one.
PolicyVariant = Literal["opencv", "timm"]


def _act(
    name: str,
    image: np.ndarray,
    level: float,
    rng: np.random.Generator,
    variant: PolicyVariant,
) -> np.ndarray:
    """Applies an action of a policy of timm."""
    if variant == "opencv":
        return ACTIONS[name](image, level / 10, rng, DEIT_STYLE)
    action = TIMM_COLORS.get(name, ACTIONS[name])
    return action(image, level / 10, rng, TIMM_STYLE)


@dataclasses.dataclass(frozen=True)
class RandAugment(Random):
    """RandAugment as in DeiT (arXiv:2012.12877), with timm's names of policies.

    `rand-m9-mstd0.5-inc1` applies two actions with probability 0.5 each, at a level drawn from a
    normal distribution of mean 9 and standard deviation 0.5; their strength increases with it.
    Parts and defaults: m (10), n (2 actions), mstd (0), mmax (10, the highest level), p (0.5),
    inc (0). With `variant` "timm" images are turned, sheared and moved by Pillow's bicubic
    interpolation, as in DeiT, with "opencv" by a bilinear one.
    """

    policy: str = "rand-m9-mstd0.5-inc1"
    variant: PolicyVariant = "opencv"

    def __post_init__(self) -> None:
        _parse_rand(self.policy)

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        parts = _parse_rand(self.policy)
        actions = DEIT_INCREASING_ACTIONS if parts["inc"] else DEIT_ACTIONS
        for _ in range(int(parts["n"])):
            name = actions[rng.integers(len(actions))]
            if rng.random() >= parts["p"]:
                continue
            level = np.clip(rng.normal(parts["m"], parts["mstd"]), 0, parts["mmax"])
            image = _act(name, image, float(level), rng, self.variant)
        return image


@functools.cache
def _parse_rand(policy: str) -> dict[str, float]:
    parts = {"m": 10.0, "n": 2.0, "mstd": 0.0, "mmax": 10.0, "p": 0.5, "inc": 0.0}
    first, *rest = policy.split("-")
    for part in rest:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in parts:
            raise ValueError(
                f"policy={policy!r}: part {part!r}: expected a number after one of "
                f"{', '.join(parts)}"
            )
        parts[match[1]] = float(match[2])
    if first != "rand" or parts["p"] > 1 or parts["n"] % 1:
        raise ValueError(
            f"policy={policy!r}: expected something like 'rand-m9-mstd0.5-inc1', with p up to 1 "
            "and a whole n"
        )
    return parts


# Pairs of actions, each with its probability in tenths and its level: arXiv:1805.09501, table 9,
# and the later policy v0 of the authors' code.
_PAIRS = {
    "original": """
        posterize_original 4 8 rotate 6 9; solarize 6 5 autocontrast 6 5; equalize 8 8 equalize 6 3;
        posterize_original 6 7 posterize_original 6 6; equalize 4 7 solarize 2 4;
        equalize 4 4 rotate 8 8; solarize 6 3 equalize 6 7; posterize_original 8 5 equalize 10 2;
        rotate 2 3 solarize 6 8; equalize 6 8 posterize_original 4 6; rotate 8 8 color 4 0;
        rotate 4 9 equalize 6 2; equalize 0 7 equalize 8 8; invert 6 4 equalize 10 8;
        color 6 4 contrast 10 8; rotate 8 8 color 10 2; color 8 8 solarize 8 7;
        sharpness 4 7 invert 6 8; shear_x 6 5 equalize 10 9; color 4 0 equalize 6 3;
        equalize 4 7 solarize 2 4; solarize 6 5 autocontrast 6 5; invert 6 4 equalize 10 8;
        color 6 4 contrast 10 8; equalize 8 8 equalize 6 3""",
    "v0": """
        equalize 8 1 shear_y 8 4; color 4 9 equalize 6 3; color 4 1 rotate 6 8;
        solarize 8 3 equalize 4 7; solarize 4 2 solarize 6 2; color 2 0 equalize 8 8;
        equalize 4 8 solarize_add 8 3; shear_x 2 9 rotate 6 8; color 6 1 equalize 10 2;
        invert 4 9 rotate 6 0; equalize 10 9 shear_y 6 3; color 4 7 equalize 6 0;
        posterize 4 6 autocontrast 4 7; solarize 6 8 color 6 9; solarize 2 4 rotate 8 9;
        rotate 10 7 translate_y_relative 8 9; shear_x 0 0 solarize 8 4; shear_y 8 0 color 6 4;
        color 10 0 rotate 6 2; equalize 8 4 equalize 0 8; equalize 10 4 autocontrast 6 2;
        shear_y 4 7 solarize_add 6 7; posterize 8 2 solarize 6 10; solarize 6 8 equalize 6 1;
        color 8 6 rotate 4 5""",
}


@dataclasses.dataclass(frozen=True)
class AutoAugment(Random):
    """Applies one of 25 pairs of actions, each with its probability (arXiv:1805.09501).

    `original` is the paper's policy for ImageNet; `v0` is the later one of the authors' code.
    `variant` is that of `RandAugment`.
    """

    policy: Literal["original", "v0"] = "original"
    variant: PolicyVariant = "opencv"

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        pairs = parse_pairs(self.policy)
        for name, probability, level in pairs[rng.integers(len(pairs))]:
            if rng.random() < probability:
                image = _act(name, image, level, rng, self.variant)
        return image


@functools.cache
def parse_pairs(policy: str) -> tuple[tuple[tuple[str, float, float], ...], ...]:
    """The pairs of an AutoAugment policy; an action is (name, probability, level)."""
    found = []
    for pair in _PAIRS[policy].split(";"):
        words = pair.split()
        actions = zip(words[::3], words[1::3], words[2::3], strict=True)
        found.append(tuple((name, int(p) / 10, float(level)) for name, p, level in actions))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class ThreeAugment(Random):
    """Applies grayscale, solarize or a Gaussian blur, with equal chances (arXiv:2204.07118)."""

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        ops = (Grayscale(), Solarize(), GaussianBlur())
        return ops[rng.integers(3)](features, rng)


class _Sometimes(Random):
    """An operation that changes the colours of the image with a probability."""

    maps = "keep"

    probability: float

    def __post_init__(self) -> None:
        if self.probability > 1:
            raise ValueError(f"probability={self.probability}: expected at most 1")

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        return features if rng.random() >= self.probability else super().__call__(features, rng)


@dataclasses.dataclass(frozen=True)
class Grayscale(_Sometimes):
    """Replaces each channel by the luma, with this probability."""

    probability: float = 1.0

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return colors.grayscale(image)


@dataclasses.dataclass(frozen=True)
class Luma(Transform):
    """Makes an image of one channel, its luma, uint8 `[height, width, 1]`; last in a line."""

    maps = "keep"

    def change(self, image: np.ndarray) -> np.ndarray:
        return colors.to_gray(image)[..., None]


@dataclasses.dataclass(frozen=True)
class Solarize(_Sometimes):
    """Inverts the values of `threshold` or more, with this probability."""

    threshold: int = 128
    probability: float = 1.0
    may_be_zero = ("threshold",)

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return colors.solarize(image, self.threshold)


@dataclasses.dataclass(frozen=True)
class GaussianBlur(_Sometimes):
    """Blurs with this probability; standard deviation is `sigma_min` to `sigma_max` pixels."""

    sigma_min: float = 0.1
    sigma_max: float = 2.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return colors.blur(image, rng.uniform(self.sigma_min, self.sigma_max))


@dataclasses.dataclass(frozen=True)
class ColorJitter(Random):
    """Adjusts brightness, contrast and saturation in random order, by factors of 1 ± strength.

    `contrast` and `saturation` default to `brightness`. Factors are 0 or more. The hue is turned by
    up to `hue` of the circle of colours. All of it is done with `probability`.
    """

    brightness: float
    contrast: float | None = None
    saturation: float | None = None
    hue: float = 0.0
    probability: float = 1.0
    may_be_zero = ("brightness", "contrast", "saturation", "hue")
    maps = "keep"

    def __post_init__(self) -> None:
        if self.hue > 0.5:
            raise ValueError(f"hue={self.hue}: expected at most 0.5, half of the circle")
        if self.probability > 1:
            raise ValueError(f"probability={self.probability}: expected at most 1")

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.probability < 1 and rng.random() >= self.probability:
            return image
        adjust = (colors.adjust_brightness, colors.adjust_contrast, colors.adjust_saturation)
        given = (self.brightness, self.contrast, self.saturation)
        for i in rng.permutation(4 if self.hue else 3):
            if i == 3:
                image = colors.turn_hue(image, rng.uniform(-self.hue, self.hue))
                continue
            strength = self.brightness if given[i] is None else given[i]
            factor = rng.uniform(max(0, 1 - strength), 1 + strength)
            image = adjust[i](image, factor) if strength else image
        return image


OPS: dict[str, type[Op]] = {
    "randaug": RandAug,
    "rand_augment": RandAugment,
    "auto_augment": AutoAugment,
    "three_augment": ThreeAugment,
    "color_jitter": ColorJitter,
    "gaussian_blur": GaussianBlur,
    "grayscale": Grayscale,
    "luma": Luma,
    "solarize": Solarize,
}
