# SPDX-License-Identifier: Apache-2.0
"""Features of a TFDS dataset that have the image, and the class or the depth of each pixel."""

import dataclasses
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data.ops.decode import ImageError, check_size
from vit_jax.data.sources.columns import split_columns
from vit_jax.data.sources.label_maps import (
    CLASSES,
    SCALE,
    Values,
    decode_depth,
    decode_mask,
    make_values,
    read_scale,
    read_values,
    to_metres,
)
from vit_jax.utils.errors import UserError

# What features are chosen for, as in `NAME#mask=FEATURE`.
_ROLES = ("image", "mask", "depth")

# What TFDS calls these features in its datasets; the first one that is there is read.
_USUAL = {
    "image": ("image", "image_left"),
    "mask": (
        "mask",
        "segmentation_mask",
        "segmentation_label",
        "annotation",
        "segmentation",
        "label",
    ),
    "depth": ("depth", "depth_map"),
}


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """Splits `NAME#mask=FEATURE` into the name of a TFDS dataset and features by their role.

    Raises `UserError` for anything else after a `#`.
    """
    base, chosen = split_columns(name, _ROLES)
    if "#" in base:
        raise UserError(
            f"data.name={name!r}: expected {base.partition('#')[0]}#mask=FEATURE, with "
            f"{', '.join(_ROLES[:-1])} or {_ROLES[-1]} before the '='"
        )
    if "mask" in chosen and "depth" in chosen:
        raise UserError(f"data.name={name!r}: expected a mask or a depth, not both")
    return base, chosen


def find_image(features: Mapping[str, Any], chosen: Mapping[str, str], *, name: str) -> str | None:
    """The feature with the image: as chosen, or usual, or else the only one in colours.

    Raises `UserError` if the feature that is chosen is missing, or no image.
    """
    if "image" in chosen:
        _check_there(features, "image", chosen["image"], name=name)
        if not isinstance(features[chosen["image"]], tfds.features.Image):
            raise _refuse(features, "image", chosen["image"], "an Image", name=name)
        return chosen["image"]
    images = {n: f for n, f in features.items() if isinstance(f, tfds.features.Image)}
    usual = [feature for feature in _USUAL["image"] if feature in images]
    in_colours = [
        n for n, f in images.items() if _shape_of(f)[-1] == 3 and _dtype_of(f) == np.uint8
    ]
    return usual[0] if usual else in_colours[0] if len(in_colours) == 1 else None


def find_map(
    features: Mapping[str, Any], chosen: Mapping[str, str], *, image: str | None, name: str
) -> tuple[str, str] | None:
    """What the label maps of a dataset are, `mask` or `depth`, and the feature that has them.

    It is the one that is chosen, or usual, or else the only `LabeledImage`.

    Raises:
      UserError: the feature that is chosen can't have label maps, or none is chosen and the dataset
        has both masks and depths.
    """
    for kind in ("mask", "depth"):
        if kind not in chosen:
            continue
        feature = chosen[kind]
        _check_there(features, kind, feature, name=name)
        if feature == image:
            raise UserError(
                f"data.name={name!r}: {image} is the image; expected another feature for the "
                f"{kind}, of {', '.join(features)}"
            )
        if not _may_be(kind, features[feature]):
            numbers = "integers" if kind == "mask" else "numbers"
            expected = f"an Image, not as JPEG, or a Tensor of {numbers} (height, width)"
            raise _refuse(features, kind, feature, expected, name=name)
        return kind, feature
    found = find_usual_maps(features, image=image)
    if len(found) > 1:
        raise UserError(
            f"data.name={name!r} has masks and depths: expected one of them, "
            f"{name}#mask={found['mask']} or {name}#depth={found['depth']}"
        )
    return next(iter(found.items()), None)


def find_usual_maps(features: Mapping[str, Any], *, image: str | None) -> dict[str, str]:
    """The features that have masks and depths by their names or their types, by `mask`, `depth`."""
    found = {}
    for kind in ("mask", "depth"):
        usual = [n for n in _USUAL[kind] if n != image and _may_be(kind, features.get(n))]
        if not usual and kind == "mask":
            labeled = [n for n, f in features.items() if isinstance(f, tfds.features.LabeledImage)]
            usual = labeled if len(labeled) == 1 else []
        if usual:
            found[kind] = usual[0]
    return found


def _check_there(features: Mapping[str, Any], role: str, feature: str, *, name: str) -> None:
    if feature not in features:
        raise UserError(
            f"data.name={name!r} has no feature {feature}; expected one of "
            f"{', '.join(features)} for the {role}"
        )


def _refuse(
    features: Mapping[str, Any], role: str, feature: str, expected: str, *, name: str
) -> UserError:
    kind = " ".join(repr(features[feature]).split())[:100]
    return UserError(
        f"data.name={name!r}: the feature {feature} is {kind}; expected {expected} for the {role}, "
        f"of {', '.join(features)}"
    )


def _may_be(kind: str, feature: Any) -> bool:
    """Whether a feature may have masks or depths, by its type."""
    if isinstance(feature, tfds.features.Image):
        floats = _dtype_of(feature).kind == "f"
        return feature.encoding_format != "jpeg" and not (floats and kind == "mask")
    if type(feature) is not tfds.features.Tensor:  # Others, such as ClassLabel, are a Tensor too.
        return False
    shape, dtype = _shape_of(feature), _dtype_of(feature)
    of_pixels = len(shape) == 2 or (len(shape) == 3 and shape[-1] == 1)
    return of_pixels and dtype.kind in ("biu" if kind == "mask" else "iuf")


def _shape_of(feature: Any) -> tuple[int | None, ...]:
    return feature.shape


def _dtype_of(feature: Any) -> np.dtype:
    return np.dtype(feature.np_dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class PixelLabels:
    """Decodes the feature of a TFDS dataset that has the class or the depth of each pixel.

    Attributes:
      feature: its name.
      values: what the values of masks mean; None for depths.
      scale: what depths of integers are divided by.
      floats: whether it is an image of floats, whose bytes TFDS stores as four channels.
    """

    feature: str
    values: Values | None = None
    scale: float | None = None
    floats: bool = False

    def decode(self, stored: bytes | np.ndarray) -> np.ndarray:
        """The label map, as in `Source`, of an encoded image or an array `[height, width(, 1)]`.

        Raises `ImageError` if it can't be read.
        """
        if not isinstance(stored, bytes):
            stored = stored[..., 0] if stored.ndim == 3 else stored
            stored = stored.astype(np.uint8) if stored.dtype == bool else stored
        if self.values is not None:
            numbers = decode_mask(stored) if isinstance(stored, bytes) else stored
            return self.values.find_classes(numbers)
        if not isinstance(stored, bytes):
            return to_metres(stored, self.scale)
        if self.floats:
            return to_metres(_read_floats(stored), self.scale)
        return decode_depth(stored, self.scale)


def _read_floats(encoded: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
            check_size(*image.size)
            channels = np.ascontiguousarray(np.asarray(image))
            return channels.view("<f4")[..., 0]
    except ImageError:
        raise
    except Exception as e:  # Pillow raises many kinds of errors for damaged files.
        raise ImageError(f"its depth can't be read: {' '.join(str(e).split())[:200]}") from e


def describe_pixels(kind: str, feature: str, kind_of: Any, folder: str, *, key: str) -> PixelLabels:
    """The meaning of a feature with masks or depths.

    Args:
      kind: `mask` or `depth`.
      feature: its name.
      kind_of: the feature of TFDS; a `LabeledImage` has names of classes.
      folder: of `classes.txt`, which takes the place of such names, or of `depth_scale.txt`.
      key: for errors.

    Raises:
      UserError: the classes have no names, or integers no scale.
    """
    if kind == "mask":
        path, names = os.path.join(folder, CLASSES), getattr(kind_of, "names", None)
        if names and not os.path.exists(path):
            where = f"{key}: the feature {feature}"
            return PixelLabels(feature, make_values([name.strip() for name in names], where=where))
        return PixelLabels(feature, read_values(folder, key=key))
    floats = _dtype_of(kind_of).kind == "f"
    scale = read_scale(folder, key=key)
    if scale is None and not floats:
        raise UserError(
            f"{key}: the feature {feature} has integers, and there is no file "
            f"{os.path.join(folder, SCALE)}: expected one with the number that is one metre, such "
            "as 1000 for millimetres"
        )
    is_image = isinstance(kind_of, tfds.features.Image)
    return PixelLabels(feature, scale=scale, floats=floats and is_image)
