# SPDX-License-Identifier: Apache-2.0
"""Looks into a run for people: augmented images and histograms of parameters."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.data.ops.patches import to_images
from vit_jax.data.rows import unpack
from vit_jax.models.patches import PatchBatch
from vit_jax.objectives.base import Params
from vit_jax.training.experiment import Experiment
from vit_jax.training.step import step_rng
from vit_jax.utils.tree import flatten


def preview_images(
    experiment: Experiment, batch: Mapping[str, jax.Array], count: int
) -> np.ndarray:
    """Some images of the first batch as the model sees them, mixed among themselves.

    Args:
      experiment: whose augmentation is applied.
      batch: from `Experiment.train_batches`; the rows of this process are taken.
      count: images at most.

    Returns:
      uint8 `[n, height, width, 3]`.
    """
    images, _ = _augment(experiment, {k: _local_rows(x, count) for k, x in batch.items()})
    return images[:count]


def preview_first_batch(experiment: Experiment) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of the first step as the model sees them, and their labels or targets.

    Returns:
      Images, uint8 `[batch, height, width, 3]`, and what the model learns of them: targets, float32
      `[batch, classes]`, or, if the objective has none, the labels of the data, or None without.
    """
    return _augment(experiment, next(experiment.image_batches(0)))


def _augment(
    experiment: Experiment, batch: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    rng, _ = jax.random.split(step_rng(experiment.settings.seed, 0))
    augmented = experiment.objective.augment(dict(batch), rng)
    images, targets = augmented["image"], augmented.get("target", batch.get("label"))
    learned = None if targets is None else np.asarray(targets)
    if isinstance(images, PatchBatch):  # Nothing on the device changes these.
        if images.is_packed and learned is not None:
            return unpack(batch), learned.reshape(-1, *learned.shape[2:])
        return to_images(np.asarray(batch["image"])), learned
    args = experiment.settings.objective
    mean, std = (args.get(key, 0.5) for key in ("pixel_mean", "pixel_std"))
    pixels = np.asarray(images) * std + mean
    return np.round(255 * pixels.clip(0, 1)).astype(np.uint8), learned


def _local_rows(x: jax.Array, count: int) -> np.ndarray:
    """The first rows of a global array among those that this process has."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])[:count]


def measure_params(params: Params, mesh: Mesh) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Histograms of all parameters, `params/PATH`: counts `[30]` and edges `[31]` of the bins."""
    return jax.device_get(_jit_histograms(mesh)(params))


@functools.cache
def _jit_histograms(mesh: Mesh) -> Any:
    def measure(params: Params) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = {path: x.astype(jnp.float32) for path, x in flatten(params).items()}
        return {f"params/{path}": jnp.histogram(x, bins=30) for path, x in found.items()}

    return jax.jit(measure, out_shardings=NamedSharding(mesh, PartitionSpec()))
