# SPDX-License-Identifier: Apache-2.0
"""What the features of patches tell apart, in a picture of their principal components."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.evaluators.base import Columns, Evaluator, write_file
from vit_jax.evaluators.reconstruction import encode_grid
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.base import Batch, Params
from vit_jax.objectives.collapse import patch_cosines
from vit_jax.observe.console import log
from vit_jax.utils.errors import UserError

# Number of images in the picture.
_SHOWN = 8
# Of the values of a component, those that have the darkest and the brightest colour.
_LIMITS = (1, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patches(Evaluator):
    """The mean cosine among the patches of an image, and a picture at each evaluation.

    The picture has the first images of the split, and below them the three principal components of
    the features of their patches as red, green and blue. The patches of an object share a colour
    where features are good for dense tasks; where all are alike, the cosine is near 1.
    """

    needs_labels = False
    takes_patches = False
    draws = True

    def __post_init__(self) -> None:
        super().__post_init__()
        model = getattr(self.objective, "model", None)
        if not isinstance(model, VisionTransformer):
            raise UserError(
                f"evals.{self.name}.name='patches' is for the patches of model.name='vit'; "
                f"expected --config.evals.{self.name}=none here"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("patch_cosine",)

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Columns to sum: `patch_cosine`, float32 `[batch]`."""
        return {"patch_cosine": patch_cosines(self._encode(params, batch))}, {}

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns the mean `patch_cosine` and the `count` of examples; details are a picture."""
        sums, count, _ = self.sum_split(params)
        if details is not None:
            path = Path(f"{details}.png")
            with contextlib.closing(self.map_split(self.jit(self._show), params)) as batches:
                images, patches = next(batches)
            write_file(path, encode_grid([images, color_patches(patches, images.shape[1:3])]))
            log(f"wrote {path}: images, and principal components of the features of their patches")
        return {"patch_cosine": float(sums["patch_cosine"]) / count, "count": count}

    def _encode(self, params: Params, batch: Batch) -> jax.Array:
        """Features of patches, `[batch, patches, width]`."""
        model: Any = getattr(self.objective, "model")  # noqa: B009
        return self.objective.predict(params, batch)["encoded"][:, model.num_prefix_tokens :]

    def _show(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The first images, `[images, height, width, 3]`, and `[images, rows, columns, width]`."""
        model: Any = getattr(self.objective, "model")  # noqa: B009
        images = batch["image"][:_SHOWN]
        grid = model.grid(images.shape[1:3])
        patches = self._encode(params, batch)[:_SHOWN].astype(jnp.float32)
        return images.astype(jnp.float32), patches.reshape(len(images), *grid, -1)


def color_patches(patches: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Paints patches in the colours of their three principal components.

    Args:
      patches: features, float `[images, rows, columns, width]`; the components are those of all.
      size: height and width of the images.

    Returns:
      Float64 `[images, height, width, 3]` from 0 to 255.
    """
    width = patches.shape[-1]
    x = patches.reshape(-1, width).astype(np.float64)
    x = x - x.mean(axis=0)
    _, directions = np.linalg.eigh(x.T @ x)
    directions = directions[:, ::-1][:, :3]
    # A direction and its opposite are equally good: the larger values are to be positive.
    largest = np.argmax(np.abs(directions), axis=0)
    directions = directions * np.sign(directions[largest, np.arange(directions.shape[1])])
    values = x @ directions
    low, high = np.percentile(values, _LIMITS, axis=0)
    colors = 255 * np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    colors = np.pad(colors, ((0, 0), (0, 3 - colors.shape[1])))
    colors = colors.reshape(*patches.shape[:3], 3)
    rows, columns = (
        np.minimum(np.arange(side) * count // side, count - 1)
        for side, count in zip(size, patches.shape[1:3], strict=True)
    )
    return colors[:, rows][:, :, columns]
