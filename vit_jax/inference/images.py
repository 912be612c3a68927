# SPDX-License-Identifier: Apache-2.0
"""The input of a trained model: images without labels, from files, folders, patterns or pixels."""

import dataclasses
import functools
import glob
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vit_jax.data import loader
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.ops.decode import ImageError, to_rgb
from vit_jax.data.ops.fused import fuse
from vit_jax.data.ops.transforms import Random, apply
from vit_jax.data.pipeline import find_shapes
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.data.sources.files import (
    ENDINGS,
    Files,
    check_store,
    describe_ignored,
    list_images,
)
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import find_paths

logger = logging.getLogger(__name__)

_ANY_SHAPE = (None, None, 3)
STDIN = "-"


def find_images(arguments: Sequence[str], *, lines: Iterable[str] = ()) -> list[str]:
    """Finds the paths of images, in the order of the arguments.

    The images of a folder or a pattern are sorted by name.

    Args:
      arguments: files with any suffix; folders, which are searched at any depth; patterns such as
        `photos/**/*.jpg`; or `-` for `lines`.

    Raises:
      UserError: an argument matches no image.
    """
    found: list[str] = []
    for argument in arguments:
        before = len(found)
        if argument == STDIN:
            found += [line for line in (line.rstrip("\r\n") for line in lines) if line]
        elif os.path.isdir(argument):
            found += _list_folder(argument)
        elif os.path.isfile(argument) or "://" in argument:
            found.append(argument)
        elif glob.has_magic(argument):
            # `**` also matches folders, whose files it matches separately.
            found += filter(os.path.isfile, find_paths(argument))
        else:
            raise UserError(f"{argument!r}: there is no such file or folder")
        if len(found) == before:
            what = "stdin" if argument == STDIN else repr(argument)
            raise UserError(f"no images found in {what}: expected files as {', '.join(ENDINGS)}")
    for path in found:
        check_store(path, where="image ")
    if not found:
        raise UserError("no images: expected files, folders, patterns or - for a list on stdin")
    return found


def _list_folder(folder: str) -> list[str]:
    try:
        paths, others = list_images(folder, folder)
    except OSError as e:
        raise UserError(f"{folder!r} can't be read: {e.strerror}: {e.filename}") from None
    ignored = describe_ignored(others)
    if not paths:
        raise UserError(
            f"no images found in {folder!r}: expected files as {', '.join(ENDINGS)}"
            f"{f'; left out: {ignored}' if ignored else ''}"
        )
    if ignored:
        logger.info("%s: ignored files that are no images of a known format: %s", folder, ignored)
    return sorted(os.path.normpath(os.path.join(folder, path)) for path in paths)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Prepares images as the input of a model.

    Attributes:
      line: preprocessing operations, as in a config.
      image_shape: height, width and channels of the result.
    """

    line: str
    image_shape: tuple[int, int, int]

    @functools.cached_property
    def _ops(self) -> tuple[Any, ...]:
        return fuse(parse_preprocess(self.line, key="preprocess"))

    @property
    def random(self) -> bool:
        """Whether any operation draws random numbers, as in training."""
        return any(isinstance(op, Random) for op in parse_preprocess(self.line, key="preprocess"))

    def __call__(self, image: Any, *, seed: int = 0) -> np.ndarray:
        """Prepares one image.

        Args:
          image: a path or URL, the bytes of a file, uint8 pixels `[height, width]` or
            `[height, width, 3]`, or a Pillow image.
          seed: seed of random operations.

        Returns:
          uint8 `image_shape`.

        Raises:
          ImageError: the image cannot be read, or has another size and `line` does not resize.
        """
        features = {"image": read_image(image), "label": np.int32(0)}
        pixels = apply(self._ops, features, np.random.default_rng(seed))["image"]
        if pixels.shape != self.image_shape:
            height, width, channels = self.image_shape
            raise ImageError(
                f"{self.line!r} leaves an image of {pixels.shape[0]}x{pixels.shape[1]}; expected "
                f"{height}x{width} with {channels} channels"
            )
        return pixels


def read_image(image: Any) -> bytes | np.ndarray:
    """The bytes of a file, or pixels, uint8 `[height, width, 3]`; see `Preparation.__call__`."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Files("", [os.fspath(image)]).read(0)
    if hasattr(image, "convert"):
        try:
            image = to_rgb(image)
        except (OSError, SyntaxError) as e:  # Pillow reads pixels late.
            raise ImageError(f"a Pillow image that can't be read: {e}") from None
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ImageError(
            f"pixels of {pixels.dtype} {list(pixels.shape)}: expected uint8 [height, width, 3]"
        )
    return pixels


def make_preparation(
    line: str | None, image_size: tuple[int, int] | None, *, given: str | None = None
) -> Preparation:
    """Chooses the preparation of images for a model.

    Args:
      line: preprocessing with which the weights were evaluated, if it is known.
      image_size: height and width in the metadata of the weights, if they are known.
      given: preprocessing that replaces `line`.

    Raises:
      UserError: `given` yields images of different sizes, or nothing is known about the images.
    """
    if line is None and image_size is not None:
        line = f"decode|resize{tuple(image_size)}"
    line = line if given is None else given
    if line is None:
        raise UserError(
            "it is not known how images are prepared for these weights: expected a "
            "preprocess, such as 'decode|resize(224)'"
        )
    shapes = find_shapes(line, _ANY_SHAPE, key="preprocess")
    if len(shapes) == 1:
        return Preparation(line, shapes.pop())
    if given is not None:
        raise UserError(
            f"preprocess={given!r} leaves images in different sizes: add resize(SIZE) or a crop"
        )
    # All images of the data had one size, so the line does not resize.
    if image_size is None:
        raise UserError(
            f"preprocess={line!r}, with which these weights were evaluated, leaves images in "
            "different sizes: expected another one, such as 'decode|resize(224)'"
        )
    return Preparation(line, (*image_size, 3))


@dataclasses.dataclass
class ImageBatch:
    """Prepared images with their paths.

    Attributes:
      images: uint8 `[batch, height, width, 3]`; a row without an image is zero.
      paths: path of each row; None for a row without an image.
    """

    images: np.ndarray
    paths: list[str | None]


def load_images(
    paths: Sequence[str],
    preparation: Preparation,
    *,
    batch_size: int,
    corrupt: CorruptCounter,
    num_threads: int | None = None,
) -> Iterator[ImageBatch]:
    """Yields batches of one shape, in order; the last one is padded with zeros.

    Args:
      corrupt: counts and names images that cannot be read.
      num_threads: threads that decode ahead; 0 decodes in the caller's, None is one per core.
    """

    def make(step: int) -> ImageBatch:
        shape = (batch_size, *preparation.image_shape)
        return ImageBatch(np.zeros(shape, np.uint8), [None] * batch_size)

    def fill(batch: ImageBatch, step: int, start: int, stop: int) -> None:
        for row in range(start, min(stop, len(paths) - step * batch_size)):
            index = step * batch_size + row
            corrupt.see(1)
            try:
                batch.images[row] = preparation(paths[index], seed=index)
                batch.paths[row] = paths[index]
            except ImageError as e:
                corrupt.add(paths[index], e)

    threads = loader.count_threads(num_threads)
    return loader.Loader(
        range(-(-len(paths) // batch_size)),
        make=make,
        fill=fill,
        rows=batch_size,
        num_threads=threads,
        ahead=loader.count_ahead(batch_size, threads),
    )
