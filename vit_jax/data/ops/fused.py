# SPDX-License-Identifier: Apache-2.0
"""Decode, crop, resize and mirror a JPEG or pixels in one pass of native code.

`fuse` puts one operation in place of the first operations of a line if these have a known form.
Pixels and random draws are those of the operations. Without the extension, and for what it does
not take (PNG, CMYK, damaged files), the operations themselves run.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.ops.decode import MAX_PIXELS, extension
from vit_jax.data.ops.transforms import (
    CentralCrop,
    Decode,
    Features,
    FlipLr,
    InceptionCrop,
    Op,
    Random,
    Resize,
    ResizeSmall,
    apply,
)


class Job(NamedTuple):
    """An image for the extension to make.

    Attributes:
      source: bytes of a JPEG, or pixels as uint8 `[height, width, 3]`.
      part: top, left, height and width of the part of the source that is used.
      full: height and width that the part is resized to.
      window: top, left, height and width of the part of that which is the image.
      flip: whether the image is mirrored.
    """

    source: bytes | np.ndarray
    part: tuple[int, int, int, int]
    full: tuple[int, int]
    window: tuple[int, int, int, int]
    flip: bool


def decode(jobs: Iterable[Job], images: Iterable[np.ndarray]) -> list[bool]:
    """Runs jobs in one call, without the GIL; returns whether each image was made.

    `images` is memory for the image of each job, uint8 of the size of its window. The operations
    decide on images that were not made.
    """
    items = [(job.source, image, *job[1:]) for job, image in zip(jobs, images, strict=True)]
    return extension.decode(items) if items else []


@dataclasses.dataclass(frozen=True)
class Fused(Random):
    """`decode`, operations that crop and resize, and an optional `flip_lr`, as one operation."""

    ops: tuple[Any, ...]

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        if "label_map" in features:  # The native code takes images alone.
            return apply(self.ops, features, rng)
        state = rng.bit_generator.state
        job = self.plan(features["image"], rng)
        if job is not None:
            image = np.empty((*job.window[2:], 3), np.uint8)
            if decode([job], [image])[0]:
                return features | {"image": image}
            rng.bit_generator.state = state
        return apply(self.ops, features, rng)

    def plan(self, source: bytes | np.ndarray, rng: np.random.Generator) -> Job | None:
        """Makes the random choices for an image, without decoding it.

        Returns None, before any choice, for what the extension does not take or operations refuse.
        """
        if isinstance(source, np.ndarray):
            height, width, turned = *source.shape[:2], False
        elif (size := extension.size(source)) is None:
            return None
        else:
            height, width, turned = size
        _, resize, *rest = self.ops
        if turned and self.ops[0].orient:
            return None
        part = (0, 0, height, width)
        if isinstance(resize, InceptionCrop):
            part, full = resize.draw(height, width, rng), (resize.size, resize.size)
        elif isinstance(resize, Resize):
            full = (resize.height, resize.width or resize.height)
        else:
            full = resize.shape(height, width)
        window = (0, 0, full[0], full[1])
        if rest and isinstance(crop := rest[0], CentralCrop):
            window = crop.window(*full)
            if full[0] * full[1] > MAX_PIXELS or window[2] > full[0] or window[3] > full[1]:
                return None
        flip = isinstance(self.ops[-1], FlipLr) and self.ops[-1].draw(rng)
        return Job(source, part, full, window, flip)


def defer(ops: Sequence[Op], features: Features, rng: np.random.Generator) -> Features:
    """Like `apply`, but if one native call does it all, `image` is the `Job` for that call."""
    fused = ops[0]
    if len(ops) > 1 or not isinstance(fused, Fused) or "label_map" in features:
        return apply(ops, features, rng)
    job = fused.plan(features["image"], rng)
    return apply(fused.ops, features, rng) if job is None else features | {"image": job}


def fuse(ops: Sequence[Op]) -> tuple[Op, ...]:
    """The same operations, of which the first are one if they have a known form.

    Known are `decode|inception_crop(N)`, `decode|resize(N)` and
    `decode|resize_small(N)|central_crop(M)`, bilinear, each with `|flip_lr` or without.
    """
    if extension is None or not ops or not isinstance(ops[0], Decode):
        return tuple(ops)
    kinds = tuple(type(op) for op in ops[1:])
    for form in ((InceptionCrop,), (Resize,), (ResizeSmall, CentralCrop)):
        # The extension resizes in one way only.
        if kinds[: len(form)] == form and getattr(ops[1], "method", None) == "bilinear":
            end = 1 + len(form)
            end += kinds[end - 1 : end] == (FlipLr,)
            return (Fused(tuple(ops[:end])), *ops[end:])
    return tuple(ops)
