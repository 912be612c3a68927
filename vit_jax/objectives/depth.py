# SPDX-License-Identifier: Apache-2.0
"""Depth in metres of each pixel, from the patch tokens of a Vision Transformer.

The head gives a weight to each of a number of depths, and their mean is the depth: arXiv:2011.14141
with uniform bins, as in arXiv:2304.07193, section 7.4. Source of the loss: arXiv:1406.2283,
equation 4, with the factor and the square root of arXiv:1907.10326, equation 4.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.objectives.base import Params, headless
from vit_jax.objectives.dense import DenseObjective, Head, check_options
from vit_jax.objectives.pixels import Pixels
from vit_jax.utils.errors import UserError

# Is added to a weight, so that none is 0, and to a depth, so that it has a logarithm.
_LEAST_WEIGHT = 0.1
_LEAST_DEPTH = 1e-3
# The weight of the squared mean of the errors beside their variance.
_MEAN_WEIGHT = 0.15
# Every so many pixels count in each scale of the gradient loss.
_STRIDES = (1, 2, 4, 6)
_STEP = "depth_step"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(DenseObjective):
    """The scale-invariant error of the logarithm of the depth; pixels without a depth do not count.

    Depths of pixels are in metres, and 0 where they are not known. Those above `max_depth` do not
    count either. The depth is computed on the grid of the head, and resized to the label map. The
    parameters of the head are stored under `depth_head`.

    Attributes:
      min_depth: of the first bin, and the least depth that is predicted, in metres.
      max_depth: of the last bin.
      gradient_weight: of the loss of differences between neighbours; 0 for none.
      mean_steps: the loss of so many first steps is that of the mean error alone.
    """

    min_depth: float
    max_depth: float
    gradient_weight: float
    mean_steps: int

    head_params = "depth_head"
    output = "pixel_depth"
    inputs = (_STEP,)

    def read_logits(self, logits: jax.Array) -> jax.Array:
        """The mean of the bins, in metres, float32 `[batch, rows, columns, 1]`."""
        weights = jax.nn.relu(logits) + _LEAST_WEIGHT
        bins = jnp.linspace(self.min_depth, self.max_depth, logits.shape[-1], dtype=jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        depth = jnp.matmul(weights, bins, precision=exact) / weights.sum(axis=-1)
        return depth[..., None]

    def finish(self, outputs: jax.Array) -> jax.Array:
        """Metres from `min_depth` to `max_depth`, float32 `[batch, h, w, 1]`."""
        return jnp.clip(outputs, self.min_depth, self.max_depth)

    def step_inputs(self, step: jax.Array, average: Params) -> dict[str, jax.Array]:
        return {_STEP: step} if self.mean_steps else {}

    def pixel_loss(
        self, params: Params, outputs: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        depth, valid = outputs[..., 0], (labels > 0) & (labels <= self.max_depth)
        mean, variance = find_log_errors(depth, labels, valid)
        loss = _root(variance + _MEAN_WEIGHT * mean**2)
        if self.mean_steps:
            alone = _MEAN_WEIGHT**0.5 * jnp.abs(mean)
            loss = jnp.where(params[_STEP] < self.mean_steps, alone, loss)
        if self.gradient_weight:
            loss += self.gradient_weight * gradient_loss(depth, labels, valid)
        squared = jnp.where(valid, (depth - labels) ** 2, 0.0).sum()
        rmse = jnp.sqrt(squared / jnp.maximum(valid.sum(), 1))
        return loss, {"rmse": rmse, "known": valid.mean(dtype=jnp.float32)}

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if metrics.get("known", 1) > 0:
            return {}
        return {
            "known": "known 0: no pixel of these steps has a depth above 0 and up to "
            f"objective.max_depth={self.max_depth:g} metres, so nothing is learnt; check the depth "
            "images and their scale with python -m vit_jax.data.check"
        }


def _root(x: jax.Array) -> jax.Array:
    """The square root, whose derivative at 0 is 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def _log_error(depth: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """The logarithm of predicted over true depths, float32 `[batch, h, w]`; 0 if not valid."""
    error = jnp.log(depth + _LEAST_DEPTH) - jnp.log(jnp.where(valid, labels, 1.0) + _LEAST_DEPTH)
    return jnp.where(valid, error, 0.0)


def find_log_errors(
    depth: jax.Array, labels: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The mean and the unbiased variance of the log error over the valid pixels, float32 scalars.

    Args:
      depth: predicted, in metres, float32 `[batch, h, w]`.
      labels: true depths, of the same shape.
      valid: which count, bool of the same shape.
    """
    error, count = _log_error(depth, labels, valid), valid.sum()
    mean = error.sum() / jnp.maximum(count, 1)
    squared = jnp.where(valid, (error - mean) ** 2, 0.0).sum()
    return mean, squared / jnp.maximum(count - 1, 1)


def gradient_loss(depth: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean difference of the log error between pixels that are two apart, over four scales.

    Arguments are those of `find_log_errors`. Each scale has every so many rows and columns, and its
    sum is divided by its number of valid pixels. Returns a float32 scalar.
    """
    error, total = _log_error(depth, labels, valid), jnp.float32(0)
    for stride in _STRIDES:
        e, v = error[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        rows = jnp.where(v[:, 2:] & v[:, :-2], jnp.abs(e[:, 2:] - e[:, :-2]), 0.0)
        columns = jnp.where(v[:, :, 2:] & v[:, :, :-2], jnp.abs(e[:, :, 2:] - e[:, :, :-2]), 0.0)
        total += (rows.sum() + columns.sum()) / jnp.maximum(v.sum(), 1)
    return total


@headless
def make_depth(
    *,
    model: nn.Module,
    pixel_depth: bool,
    image_shape: tuple[int, int, int],
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    bins: int = 256,
    gradient_weight: float = 0.0,
    mean_steps: int = 100,
    head: Head = "linear",
    head_width: int = 256,
    layers: int = 1,
    freeze_backbone: bool = False,
    dropout: float = 0.0,
    flip: float = 0.0,
    color_jitter: float | tuple[float, float, float] = 0.0,
    pixel_mean: Pixels = 0.5,
    pixel_std: Pixels = 0.5,
) -> Depth:
    """Makes a `Depth` from config values, see `dense.check_options`.

    `bins` is the number of outputs of the head.

    Raises:
      UserError: a value out of its range, a model that is no `VisionTransformer`, or data without
        depths of pixels.
    """
    options = check_options(
        "depth",
        model,
        outputs=bins,
        image_shape=image_shape,
        head=head,
        head_width=head_width,
        layers=layers,
        freeze_backbone=freeze_backbone,
        dropout=dropout,
        flip=flip,
        color_jitter=color_jitter,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    if not pixel_depth:
        raise UserError(
            "objective.name='depth' needs the depth of each pixel: expected data with depth "
            "images, such as --config.data.name=depth:FOLDER, or DATASET#depth=FEATURE of TFDS"
        )
    if not 0 < min_depth < max_depth < float("inf"):
        raise UserError(
            f"objective.min_depth={min_depth}, objective.max_depth={max_depth}: expected metres, "
            "with 0 < min_depth < max_depth"
        )
    for key, value, least in (("bins", bins, 2), ("mean_steps", mean_steps, 0)):
        if value < least:
            raise UserError(f"objective.{key}={value}: expected at least {least}")
    if not 0 <= gradient_weight < float("inf"):
        raise UserError(f"objective.gradient_weight={gradient_weight}: expected 0 or more")
    return Depth(
        **options,
        min_depth=min_depth,
        max_depth=max_depth,
        gradient_weight=gradient_weight,
        mean_steps=mean_steps,
    )
