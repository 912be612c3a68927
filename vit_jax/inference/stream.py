# SPDX-License-Identifier: Apache-2.0
"""Any number of image files through a model, a batch at a time."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.inference.images import load_images
from vit_jax.inference.model import LoadedModel, Tta
from vit_jax.observe.progress_log import ProgressLog


def map_images(
    model: LoadedModel,
    paths: Sequence[str],
    *,
    layer: str,
    tta: Tta | None,
    batch_size: int,
    corrupt: CorruptCounter,
    num_threads: int | None = None,
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields paths, and what a layer gives for them, float32 `[n, ...]`, in order.

    All batches have one shape, so that one program is compiled. The next one is computed while one
    is looked at, and a few are loaded ahead; nothing else is kept. How far it is, is said on the
    screen.

    Args:
      model: to be applied.
      paths: of the images; those that can't be read are left out.
      layer: see `LoadedModel.features`.
      tta: likewise.
      batch_size: rounded up to what the devices can share, and down to what there is.
      corrupt: counts and names images that can't be read.
      num_threads: that decode; None for one a core.
    """
    batches = load_images(
        paths,
        model.preparation,
        batch_size=model.round_up(min(batch_size, len(paths))),
        corrupt=corrupt,
        num_threads=num_threads,
    )
    pending: tuple[list[str | None], jax.Array] | None = None
    with ProgressLog("images", total=len(paths), unit="images") as progress:
        for batch in batches:
            queued = batch.paths, model.start(batch.images, layer=layer, tta=tta)
            if pending is not None:
                yield _fetch(*pending)
                progress.advance(len(pending[0]))
            pending = queued
    if pending is not None:
        yield _fetch(*pending)


def _fetch(paths: list[str | None], rows: jax.Array) -> tuple[list[str], np.ndarray]:
    kept = [i for i, path in enumerate(paths) if path is not None]
    return [path for path in paths if path is not None], np.asarray(rows)[kept]
