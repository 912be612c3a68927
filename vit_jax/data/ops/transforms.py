# SPDX-License-Identifier: Apache-2.0
"""Operations on one example on the host, in NumPy and OpenCV, which releases the GIL.

An operation is a frozen dataclass that maps a features dict to another: `image` is uint8
`[height, width, 3]`, or encoded bytes before `Decode`; the other features stay as they are. The
fields are the arguments in a preprocessing line. `Random` operations also take a generator, which
depends only on the seed and the example's position. An operation on the image alone overrides
`change`; one on other features overrides `__call__`.

A `label_map` has the class of each pixel of the image, uint8 `[height, width]`, or its depth,
float32. Operations that move pixels move it in the same way, without interpolation; see `Maps`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import cv2
import numpy as np

from vit_jax.data.ops import crops
from vit_jax.data.ops.decode import ImageError, check_size, decode_image, orient_map
from vit_jax.data.ops.geometry import Method, resize_image
from vit_jax.utils.errors import UserError, first_line

Features = dict[str, Any]
# What an operation does with a label map: `move` it like the image, `keep` it since no pixel moves,
# or `refuse` images that have one.
Maps = Literal["move", "keep", "refuse"]
# In label maps, see `sources.base`.
_IGNORED, _NO_DEPTH = 255, 0
_Rounding = Literal["nearest", "down"]


class Transform:
    """A deterministic operation."""

    # Arguments that may be 0; other numbers must be positive.
    may_be_zero: ClassVar[tuple[str, ...]] = ()
    maps: ClassVar[Maps] = "refuse"

    def __call__(self, features: Features) -> Features:
        changed = {"image": self.change(features["image"])}
        if "label_map" in features and self.maps != "keep":
            label_map = features["label_map"]
            changed["label_map"] = find_map_op(self, label_map).change(label_map)
        return features | changed

    def change(self, image: Any) -> np.ndarray:
        raise NotImplementedError


class Random:
    """An operation with random choices."""

    may_be_zero: ClassVar[tuple[str, ...]] = ()
    maps: ClassVar[Maps] = "refuse"

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        if "label_map" not in features or self.maps == "keep":
            return features | {"image": self.change(features["image"], rng)}
        op = find_map_op(self, features["label_map"])
        before = rng.bit_generator.state
        image = self.change(features["image"], rng)
        after = rng.bit_generator.state
        # The choices depend on the size alone, so that those for the map are the same.
        rng.bit_generator.state = before
        label_map = op.change(features["label_map"], rng)
        rng.bit_generator.state = after
        return features | {"image": image, "label_map": label_map}

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError


Op = Transform | Random


def find_map_op(op: Any, label_map: np.ndarray) -> Any:
    """The operation that moves a label map as `op` moves its image.

    It takes the nearest pixel where `op` interpolates, and pads with pixels that count nowhere.
    Raises `UserError` if there is none.
    """
    if op.maps == "refuse":
        raise UserError(
            f"{op} can't be applied to images with masks, since it may move pixels of the image "
            "alone: expected operations that crop, resize, pad, flip, shift or change colours"
        )
    fields = {field.name for field in dataclasses.fields(op)}
    new = {"method": "nearest", "value": _NO_DEPTH if label_map.dtype.kind == "f" else _IGNORED}
    return dataclasses.replace(op, **{name: new[name] for name in new.keys() & fields})


def check_order(**limits: float) -> None:
    """Raises `ValueError` if the first of two arguments is above the second."""
    (low, least), (high, most) = limits.items()
    if least > most:
        raise ValueError(f"{low}={least}, {high}={most}: expected {low} <= {high}")


def apply(ops: Sequence[Op], features: Features, rng: np.random.Generator) -> Features:
    """Runs operations in their order; only those with random choices use `rng`.

    Raises:
      ImageError: the image can't be read, or an operation refuses it, such as a crop of a smaller
        image.
    """
    for op in ops:
        try:
            features = op(features, rng) if isinstance(op, Random) else op(features)
        except cv2.error as e:  # Such as a side above the 32,767 pixels of affine maps.
            shape = np.shape(features["image"])
            reason = first_line(e).rpartition(" error: ")[2]
            raise ImageError(f"{op} of an image of {list(shape)}: {reason}") from e
    return features


def name_label_map(label_map: np.ndarray) -> str:
    """What errors call a label map `[h, w]`: `depth` if it has floats, else `mask`."""
    return "depth" if label_map.dtype.kind == "f" else "mask"


@dataclasses.dataclass(frozen=True)
class Decode(Transform):
    """Decodes an image; with `orient`, its EXIF orientation is applied. Pixels stay as they are."""

    orient: bool = False

    def __call__(self, features: Features) -> Features:
        image = self.change(features["image"])
        if "label_map" not in features:
            return features | {"image": image}
        label_map = self.turn(features["label_map"], features["image"])
        if label_map.shape != image.shape[:2]:
            name = name_label_map(label_map)
            theirs, ours = label_map.shape, image.shape
            turned = " after both were turned" if label_map is not features["label_map"] else ""
            raise ImageError(
                f"its {name} has {theirs[1]}x{theirs[0]} pixels, and the image {ours[1]}x{ours[0]}"
                f"{turned}: expected the same"
            )
        return features | {"image": image, "label_map": label_map}

    def turn(self, label_map: np.ndarray, encoded: bytes | np.ndarray) -> np.ndarray:
        """A label map of the pixels as they are stored, turned as the image is."""
        return orient_map(label_map, encoded) if self.orient else label_map

    def change(self, image: bytes | np.ndarray) -> np.ndarray:
        return decode_image(image, orient=self.orient)


@dataclasses.dataclass(frozen=True)
class Keep(Transform):
    """Keeps the features of these names, and the `mask` of evaluation."""

    names: tuple[str, ...]

    def __init__(self, *names: str):
        if "image" not in names:
            raise ValueError("expected 'image' among the names")
        object.__setattr__(self, "names", names)

    def __call__(self, features: Features) -> Features:
        missing = set(self.names) - features.keys()
        if missing:
            raise UserError(
                f"keep({', '.join(map(repr, self.names))}): expected some of "
                f"{', '.join(sorted(features))}"
            )
        return {k: v for k, v in features.items() if k in self.names or k == "mask"}


@dataclasses.dataclass(frozen=True)
class Resize(Transform):
    """Resizes to `height` x `width` (default: `height`), without keeping the aspect ratio."""

    maps = "move"

    height: int
    width: int | None = None
    method: Method = "bilinear"

    def change(self, image: np.ndarray) -> np.ndarray:
        return resize_image(image, self.height, self.width or self.height, self.method)


@dataclasses.dataclass(frozen=True)
class ResizeSmall(Transform):
    """Resizes the shorter side to `size`, keeping the aspect ratio.

    The longer side is rounded to the `nearest` integer, as in big_vision, or `down`, as in
    torchvision, timm and Hugging Face.
    """

    maps = "move"

    size: int
    method: Method = "bilinear"
    rounding: _Rounding = "nearest"

    def change(self, image: np.ndarray) -> np.ndarray:
        return resize_image(image, *self.shape(*image.shape[:2]), self.method)

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for an image of this height and width."""
        short = min(height, width)
        if self.rounding == "down":
            return self.size * height // short, self.size * width // short
        scale = self.size / short
        return max(self.size, round(height * scale)), max(self.size, round(width * scale))


@dataclasses.dataclass(frozen=True)
class ResizeLong(Transform):
    """Resizes the longer side to `size`, keeping the aspect ratio."""

    maps = "move"

    size: int
    method: Method = "bilinear"

    def change(self, image: np.ndarray) -> np.ndarray:
        scale = self.size / max(image.shape[:2])
        height, width = (max(1, round(side * scale)) for side in image.shape[:2])
        return resize_image(image, height, width, self.method)


@dataclasses.dataclass(frozen=True)
class CentralCrop(Transform):
    """Crops the middle `height` x `width` (default: `height`) of an image of at least this size.

    Half of an odd number of pixels is rounded `down`, or to the `nearest` even integer, as in
    torchvision and timm.
    """

    maps = "move"

    height: int
    width: int | None = None
    rounding: _Rounding = "down"

    def change(self, image: np.ndarray) -> np.ndarray:
        _check_crop("central_crop", image, self.height, self.width or self.height)
        top, left, height, width = self.window(*image.shape[:2])
        return image[top : top + height, left : left + width]

    def window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part, for an image of this height and width."""
        size = self.height, self.width or self.height
        halves = ((height - size[0]) / 2, (width - size[1]) / 2)
        top, left = map(math.floor if self.rounding == "down" else round, halves)
        return top, left, *size


@dataclasses.dataclass(frozen=True)
class RandomCrop(Random):
    """Crops `height` x `width` (default: `height`) at a random place of an image."""

    maps = "move"

    height: int
    width: int | None = None

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        width = self.width or self.height
        _check_crop("random_crop", image, self.height, width)
        top = int(rng.integers(image.shape[0] - self.height + 1))
        left = int(rng.integers(image.shape[1] - width + 1))
        return image[top : top + self.height, left : left + width]


def _check_crop(name: str, image: np.ndarray, height: int, width: int) -> None:
    if image.shape[0] < height or image.shape[1] < width:
        size = f"{height}" if width == height else f"{height}, {width}"
        raise ImageError(
            f"{name}({size}) of a {image.shape[0]}x{image.shape[1]} image: put resize_small or "
            "pad_to before it"
        )


_BORDERS = {
    "constant": cv2.BORDER_CONSTANT,
    "edge": cv2.BORDER_REPLICATE,
    "reflect": cv2.BORDER_REFLECT_101,
}
_Border = Literal["constant", "edge", "reflect"]


class _Padding(Transform):
    value: int
    mode: _Border
    may_be_zero = ("value",)
    maps = "move"

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 255:
            raise ValueError(f"value={self.value}: expected 0 to 255")

    def pad(self, image: np.ndarray, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        check_size(image.shape[1] + left + right, image.shape[0] + top + bottom)
        color, border = (self.value, self.value, self.value), _BORDERS[self.mode]
        return cv2.copyMakeBorder(image, top, bottom, left, right, border, value=color)


@dataclasses.dataclass(frozen=True)
class Pad(_Padding):
    """Adds `pixels` on each side: of one `value`, like the edge, or its reflection."""

    pixels: int
    value: int = 0
    mode: _Border = "constant"

    def change(self, image: np.ndarray) -> np.ndarray:
        p = self.pixels
        return self.pad(image, p, p, p, p)


@dataclasses.dataclass(frozen=True)
class PadTo(_Padding):
    """Pads an image that is smaller to `height` x `width` (default: `height`) on all sides."""

    height: int
    width: int | None = None
    value: int = 0
    mode: _Border = "constant"

    def change(self, image: np.ndarray) -> np.ndarray:
        y = max(0, self.height - image.shape[0])
        x = max(0, (self.width or self.height) - image.shape[1])
        return self.pad(image, y // 2, y - y // 2, x // 2, x - x // 2)


@dataclasses.dataclass(frozen=True)
class InceptionCrop(Random):
    """Resizes a random part of the image to `size` x `size` (arXiv:1409.4842).

    The part has `area_min` to `area_max` percent of the area and an aspect (width / height) of
    `aspect_min` to `aspect_max`, which is 4/3 by default, and 1.33 as TensorFlow draws. `variant`
    names the distribution, see `crops`: recipes of vision_transformer and big_vision use
    "tensorflow", those of DeiT and MAE "torchvision", and probes of MAE "byol".
    """

    maps = "move"

    size: int
    area_min: float = 5
    area_max: float = 100
    aspect_min: float = 3 / 4
    aspect_max: float | None = None
    method: Method = "bilinear"
    variant: crops.Variant = "uniform"

    def __post_init__(self) -> None:
        if not 0 < self.area_min <= self.area_max <= 100:
            raise ValueError(
                f"area_min={self.area_min}, area_max={self.area_max}: expected "
                "0 < area_min <= area_max <= 100"
            )
        check_order(aspect_min=self.aspect_min, aspect_max=self._aspect[1])

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        top, left, h, w = self.draw(height, width, rng)
        crop = image[top : top + h, left : left + w]
        return resize_image(crop, self.size, self.size, self.method)

    def draw(self, height: int, width: int, rng: np.random.Generator) -> crops.Part:
        """Top, left, height and width of the part, for an image of this height and width."""
        area = self.area_min, self.area_max
        return crops.DRAWS[self.variant](height, width, area, self._aspect, rng)

    @property
    def _aspect(self) -> crops.Range:
        given = self.aspect_max
        return self.aspect_min, crops.ASPECT_MAX[self.variant] if given is None else given


@dataclasses.dataclass(frozen=True)
class RandomScale(Random):
    """Resizes the shorter side to `size` times a factor, keeping the aspect ratio.

    The factor is drawn from `scale_min` to `scale_max`.
    """

    maps = "move"

    size: int
    scale_min: float = 0.5
    scale_max: float = 2.0
    method: Method = "bilinear"

    def __post_init__(self) -> None:
        check_order(scale_min=self.scale_min, scale_max=self.scale_max)

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = max(1, round(self.size * rng.uniform(self.scale_min, self.scale_max)))
        return ResizeSmall(size, self.method).change(image)


@dataclasses.dataclass(frozen=True)
class FlipLr(Random):
    """Mirrors left and right with probability 0.5."""

    maps = "move"

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return image[:, ::-1] if self.draw(rng) else image

    def draw(self, rng: np.random.Generator) -> bool:
        """Whether to mirror."""
        return rng.random() < 0.5


@dataclasses.dataclass(frozen=True)
class RandomShift(Random):
    """Moves the image by up to `pixels` in each direction; the edge is replicated."""

    maps = "move"

    pixels: int

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        p, (height, width) = self.pixels, image.shape[:2]
        check_size(width + 2 * p, height + 2 * p)
        top, left = rng.integers(2 * p + 1, size=2)
        padded = cv2.copyMakeBorder(image, p, p, p, p, cv2.BORDER_REPLICATE)
        return padded[top : top + height, left : left + width]


OPS: dict[str, type[Op]] = {
    "decode": Decode,
    "keep": Keep,
    "resize": Resize,
    "resize_small": ResizeSmall,
    "resize_long": ResizeLong,
    "central_crop": CentralCrop,
    "random_crop": RandomCrop,
    "random_scale": RandomScale,
    "inception_crop": InceptionCrop,
    "pad": Pad,
    "pad_to": PadTo,
    "flip_lr": FlipLr,
    "random_shift": RandomShift,
}
