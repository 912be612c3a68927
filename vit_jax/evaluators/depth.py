# SPDX-License-Identifier: Apache-2.0
"""How well the depths of pixels are predicted, over a whole split and in a picture.

Source of the metrics: arXiv:1406.2283, section 4.2. As usual for NYUv2, each is computed for each
image, and their mean over the images counts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.sources.label_maps import SCALE
from vit_jax.evaluators.base import Columns
from vit_jax.evaluators.pixels import PixelEvaluator
from vit_jax.objectives import depth
from vit_jax.objectives.base import Batch, Params
from vit_jax.utils.errors import UserError
from vit_jax.utils.palette import color_depth

# A depth counts as right if the ratio of the two is below these.
_RATIOS = {"delta1": 1.25, "delta2": 1.25**2, "delta3": 1.25**3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(PixelEvaluator):
    """Compares predicted with true depths, pixel by pixel; see `PixelEvaluator`.

    Pixels without a depth do not count, and neither do those nearer than `min_depth` or farther
    than `max_depth` of the objective.
    """

    objective: depth.Depth

    kind = depth.Depth
    score = "rmse"
    low_is_bad = False

    def check_data(self) -> None:
        if not self.data.info.pixel_depth:
            raise UserError(
                f"evals.{self.name}: {self.data} has no depth images: expected data with them, "
                "such as depth:FOLDER"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("rmse", "abs_rel", *_RATIOS)

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Columns: none to sum, since means over pixels and then over images are not sums.

        The others are the `metrics` of each image, float32 `[batch]`, NaN for an image without a
        pixel that counts; `valid`, int32 `[batch]`, the number of such pixels; and `predicted`, in
        metres, float32 `[batch, h, w]`.
        """
        predicted, labels = self.find_pixels(params, batch)[..., 0], batch["label_map"]
        least, most = self.objective.min_depth, self.objective.max_depth
        valid = (labels >= least) & (labels <= most)
        count = valid.sum(axis=(1, 2))
        true = jnp.where(valid, labels, 1.0)

        def mean(values: jax.Array) -> jax.Array:
            total = jnp.where(valid, values, 0).sum(axis=(1, 2), dtype=jnp.float32)
            return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)

        ratio = jnp.maximum(predicted / true, true / predicted)
        columns = {
            "rmse": jnp.sqrt(mean((predicted - true) ** 2)),
            "abs_rel": mean(jnp.abs(predicted - true) / true),
            **{name: mean(ratio < most) for name, most in _RATIOS.items()},
        }
        return {}, columns | {"valid": count, "predicted": predicted}

    def gather(self, params: Params, batch: Batch) -> tuple[Any, jax.Array, jax.Array]:
        columns = self.judge_batch(params, batch)[1]
        predicted = columns.pop("predicted")
        return columns | {"mask": batch["mask"]}, columns["rmse"], predicted

    def summarize(self, parts: list[Any]) -> tuple[dict[str, float], dict[str, Any]]:
        """Means over the images that have depths.

        Raises `UserError` if none has: an error of 0 would be that of a perfect model.
        """
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        there = (columns.pop("mask") > 0) & (columns["valid"] > 0)
        if not there.any():
            low, high = self.objective.min_depth, self.objective.max_depth
            raise UserError(
                f"evals.{self.name}: no pixel of {self.data.split} has a depth from {low:g} to "
                f"{high:g} metres: expected floats in metres or integers with their {SCALE}, or "
                "other values of objective.min_depth and objective.max_depth"
            )
        pixels = int(columns.pop("valid")[there].astype(np.int64).sum())
        means = {
            name: float(values[there].astype(np.float64).mean()) for name, values in columns.items()
        }
        details = {"pixel_depth": {"pixels": pixels, "images": int(there.sum())}}
        return means, details

    def paint(self, label_map: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = label_map[label_map > 0]
        limits = (known.min(), known.max()) if known.size else (predicted.min(), predicted.max())
        return color_depth(label_map, *limits), color_depth(predicted, *limits)
