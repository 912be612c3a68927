# SPDX-License-Identifier: Apache-2.0
"""Images that a caller names or holds, in place of arrays that are prepared already."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.inference.images import find_images
from vit_jax.inference.stream import map_images
from vit_jax.utils.errors import UserError

if TYPE_CHECKING:
    from vit_jax.inference.model import LoadedModel

# Images that are computed at a time at most.
_BATCH_SIZE = 64
_PATH = (str, os.PathLike)
_IN_MEMORY = (bytes, Image.Image)


def list_given(images: Any) -> list[Any] | None:
    """Lists the paths, files in memory and Pillow images that a caller gives.

    Returns:
      Paths as text, with `~` expanded, bytes and Pillow images; None for arrays of pixels.

    Raises:
      UserError: there are pixels among paths or Pillow images.
    """
    if isinstance(images, (*_PATH, *_IN_MEMORY)):
        images = [images]
    elif hasattr(images, "read"):  # Its iterator would give lines.
        raise UserError(
            f"images are an open file, {type(images).__name__}: expected its path, or its bytes, "
            "as file.read() gives them"
        )
    elif isinstance(images, Iterator):
        images = list(images)
    elif getattr(getattr(images, "dtype", None), "kind", "") in ("U", "O", "T"):
        images = list(np.asarray(images).ravel())  # An array or a column of paths.
    if not isinstance(images, list | tuple):
        return None
    named = [isinstance(image, (*_PATH, *_IN_MEMORY)) for image in images]
    if not any(named):
        return None
    if not all(named):
        other = images[named.index(False)]
        raise UserError(
            f"images are paths or Pillow images, and a {type(other).__name__} is among them: "
            "expected only those, or only results of model.preprocess"
        )
    return [
        image if isinstance(image, _IN_MEMORY) else os.path.expanduser(str(os.fspath(image)))
        for image in images
    ]


def is_one_image(images: Any) -> bool:
    """Whether a caller gives one image, rather than a list, a folder or a pattern."""
    if isinstance(images, _PATH):
        path = os.path.expanduser(os.fspath(images))
        return os.path.isfile(path) or "://" in path
    return isinstance(images, _IN_MEMORY)


def compute_given(
    model: "LoadedModel",
    given: Sequence[Any],
    compute: Callable[[np.ndarray], Any],
    *,
    batch_size: int = _BATCH_SIZE,
    check_count: Callable[[int], None] = lambda count: None,
) -> tuple[tuple[str | None, ...], np.ndarray]:
    """Computes something for the images that `list_given` lists, such as the output of a layer.

    Args:
      model: prepares the images.
      given: paths, bytes and Pillow images.
      compute: takes a batch, uint8 `[batch, *image_shape]`, and returns `[batch, ...]`.
      batch_size: most images of a batch.
      check_count: raises `UserError` where that many images are too many.

    Returns:
      The path of each image, None for one in memory, and what was computed, `[n, ...]`.

    Raises:
      UserError: an image that is named itself can't be read, or there is none.
    """
    if all(isinstance(image, str) for image in given):
        files = find_images(given)
        check_count(len(files))
        return _compute_files(model, given, files, compute, batch_size=batch_size)
    paths, images = prepare_given(model, given)
    check_count(len(images))
    return tuple(paths), compute_rows(model, np.stack(images), compute, batch_size=batch_size)


def compute_rows(
    model: "LoadedModel",
    images: np.ndarray,
    compute: Callable[[np.ndarray], Any],
    *,
    batch_size: int,
) -> np.ndarray:
    """Computes something for prepared images, uint8 `[n, *image_shape]`, as `compute_given` does.

    The last batch is padded with zeros, so that few programs are compiled.
    """
    rows = []
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        padded = np.zeros((model.pad_rows(len(chunk)), *model.image_shape), np.uint8)
        padded[: len(chunk)] = chunk
        rows.append(np.asarray(compute(padded))[: len(chunk)])
    return np.concatenate(rows)


def prepare_given(
    model: "LoadedModel", given: Sequence[Any]
) -> tuple[list[str | None], list[np.ndarray]]:
    """Prepares the images that `list_given` lists.

    Returns:
      The path of each image, None for one in memory, and the results of `model.preprocess`.

    Raises:
      UserError: an image can't be read, or there is none.
    """
    paths: list[str | None] = []
    images: list[np.ndarray] = []
    for number, image in enumerate(given):
        if isinstance(image, str):
            found = find_images([image])
            paths += found
            images += map(model.preprocess, found)
            continue
        try:
            paths.append(None)
            images.append(model.preprocess(image))
        except UserError as e:
            raise UserError(f"image {number} of {len(given)}: {e}") from None
    return paths, images


def _compute_files(
    model: "LoadedModel",
    given: Sequence[str],
    files: Sequence[str],
    compute: Callable[[np.ndarray], Any],
    *,
    batch_size: int,
) -> tuple[tuple[str | None, ...], np.ndarray]:
    corrupt = _RefuseNamed({path for path in given if path in files})
    paths: list[str | None] = []
    rows: list[np.ndarray] = []
    for kept, outputs in map_images(
        model, files, compute=compute, batch_size=batch_size, corrupt=corrupt
    ):
        paths += kept
        rows.append(outputs)
    if not paths:
        raise UserError(f"none of {len(files):,} images can be read; the lines above say why")
    return tuple(paths), np.concatenate(rows)


class _RefuseNamed(CorruptCounter):
    """Counts images that can't be read; one that the caller named itself is an error."""

    def __init__(self, named: Collection[str]):
        super().__init__()
        self._named = named

    def add(self, record: str, reason: Exception) -> None:
        if record in self._named:
            raise UserError(f"{record}: {reason}")
        super().add(record, reason)
