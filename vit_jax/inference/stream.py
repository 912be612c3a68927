# SPDX-License-Identifier: Apache-2.0
"""Runs a model over any number of image files, a batch at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.inference.images import load_images
from vit_jax.observe.progress_log import ProgressLog

if TYPE_CHECKING:
    from vit_jax.inference.model import LoadedModel


def map_images(
    model: "LoadedModel",
    paths: Sequence[str],
    *,
    compute: Callable[[np.ndarray], jax.Array],
    batch_size: int,
    corrupt: CorruptCounter,
    num_threads: int | None = None,
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields paths with what is computed from their images, `[n, ...]`, in order.

    All batches have one shape, so one program is compiled. The next batch is computed while the
    caller uses one, and a few are loaded ahead, so memory does not grow with the number of images.
    Progress is logged.

    Args:
      paths: paths of the images; those that cannot be read are left out.
      compute: takes a batch, uint8 `[batch, *image_shape]`, as `LoadedModel.start` does.
      batch_size: capped at the power of two that holds all images, then rounded up to a multiple
        of the devices.
      corrupt: counts and names images that cannot be read.
      num_threads: threads that decode; None is one per core.
    """
    batches = load_images(
        paths,
        model.preparation,
        batch_size=model.round_up(min(batch_size, model.pad_rows(len(paths)))),
        corrupt=corrupt,
        num_threads=num_threads,
    )
    pending: tuple[list[str | None], jax.Array] | None = None
    with ProgressLog("images", total=len(paths), unit="images") as progress:
        for batch in batches:
            queued = batch.paths, compute(batch.images)
            if pending is not None:
                yield _fetch(*pending)
                progress.advance(len(pending[0]))
            pending = queued
    if pending is not None:
        yield _fetch(*pending)


def _fetch(paths: list[str | None], rows: jax.Array) -> tuple[list[str], np.ndarray]:
    kept = [i for i, path in enumerate(paths) if path is not None]
    return [path for path in paths if path is not None], np.asarray(rows)[kept]
