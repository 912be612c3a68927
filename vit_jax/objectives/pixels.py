# SPDX-License-Identifier: Apache-2.0
"""Converts uint8 pixels to the floats that a model expects, and back.

The line that prepares images decides whether they are images, or columns of patches of images of
any size (`data.ops.patches`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.ops.patches import find_patches
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.models.interface import Model, takes_any_size
from vit_jax.models.patches import PatchBatch
from vit_jax.objectives.base import Objective
from vit_jax.utils.errors import UserError

# One number for all channels, or one for each.
Pixels = float | tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageObjective(Objective):
    """An objective whose model takes normalised pixels.

    Attributes:
      pixel_mean: mean of pixels in [0, 1], which is subtracted; one number, or one per channel.
      pixel_std: divisor, applied after the mean; one number, or one per channel.
    """

    pixel_mean: Pixels = 0.5
    pixel_std: Pixels = 0.5

    def normalize(self, images: jax.Array) -> Any:
        """Scales pixels to [-1, 1] by default, as the published weights expect; see `prepare`."""
        return prepare(getattr(self, "model", None), images, self.pixel_mean, self.pixel_std)

    def normalize_rows(self, batch: Mapping[str, jax.Array]) -> PatchBatch:
        """What `normalize` makes of rows that images share: see `data.rows.Row`."""
        patches, _ = PatchBatch.split_columns(batch["image"])
        pixels, places = normalize(patches, self.pixel_mean, self.pixel_std), batch["places"]
        return PatchBatch(pixels, places[..., 1:], batch["grids"], places[..., 0])


def prepare(model: Model, images: jax.Array, mean: Pixels, std: Pixels) -> Any:
    """The input of a model, with pixels that are normalised as in `normalize`.

    Takes images, uint8 `[batch, height, width, channels]`, and returns them as float32; or columns
    of patches, if the model was given these by `fit_to_line`, and returns a `PatchBatch`.
    """
    if not takes_any_size(model):
        return normalize(images, mean, std)
    patches, grids = PatchBatch.split_columns(images)
    return PatchBatch.of_images(normalize(patches, mean, std), grids)


def fit_to_line(model: Model, line: str, *, key: str) -> Model:
    """The model as it takes the images that a preprocessing line makes.

    Args:
      model: to be told whether they are columns of patches, of images of any size.
      line: see `data.preprocess`; its operations are those of `key`.
      key: of the line in the config, for errors.

    Raises:
      UserError: the model does not take images of any size, or patches of this size.
    """
    op = find_patches(parse_preprocess(line, key=key))
    if hasattr(model, "towers"):
        return model.clone(img=fit_to_line(model.img, line, key=key))
    if op is None:
        return model.clone(any_size=False) if takes_any_size(model) else model
    if not hasattr(model, "check_rows"):
        raise UserError(
            f"{key}={line!r} makes patches of images of any size, which only model.name='vit' takes"
        )
    if (op.size, op.size) != model.patch_size:
        raise UserError(
            f"{key}={line!r}: patches of {op.size} pixels, and model.patch_size="
            f"{model.patch_size}: expected the same"
        )
    try:
        model.check_rows(packed=False)
    except UserError as e:
        raise UserError(f"{key}={line!r}: {e}") from None
    return model.clone(any_size=True)


def normalize(images: jax.Array, mean: Pixels, std: Pixels) -> jax.Array:
    """Subtracts `mean` from pixels in [0, 1] and divides by `std`.

    Images are `[..., channels]` of any dtype, from 0 to 255; the result is float32. Raises
    `UserError` if there are three numbers and one channel.
    """
    for name, value in (("pixel_mean", mean), ("pixel_std", std)):
        if np.size(value) not in (1, images.shape[-1]):
            raise UserError(
                f"objective.{name}={value}: {np.size(value)} numbers for images of "
                f"{images.shape[-1]} channel{'s' * (images.shape[-1] > 1)}: expected one number"
            )
    means, stds = (np.asarray(x, np.float32) for x in (mean, std))
    return images.astype(jnp.float32) / (255 * stds) - means / stds


def denormalize(images: jax.Array, mean: Pixels, std: Pixels) -> jax.Array:
    """The inverse of `normalize`: float `[..., channels]` to the same shape and dtype, 0 to 255."""
    means, stds = (np.asarray(x, np.float32) for x in (mean, std))
    return 255 * (images * stds + means)


def check_pixels(mean: Pixels, std: Pixels) -> tuple[Pixels, Pixels]:
    """Returns both so that they can be hashed.

    Raises `UserError` unless each is one finite number or three, and `std` is above 0.
    """
    for name, value in (("pixel_mean", mean), ("pixel_std", std)):
        numbers = [
            isinstance(x, float | int | np.number) for x in np.ravel(np.asarray(value, object))
        ]
        if len(numbers) not in (1, 3) or not all(numbers) or not np.all(np.isfinite(value)):
            raise UserError(f"objective.{name}={value}: expected a number, or one for each of RGB")
    if min(np.ravel(std)) <= 0:
        raise UserError(f"objective.pixel_std={std}: expected more than 0")
    mean, std = (x if isinstance(x, float | int) else tuple(x) for x in (mean, std))
    return mean, std
