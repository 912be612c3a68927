# SPDX-License-Identifier: Apache-2.0
"""Decode, crop, resize and mirror in one pass over a JPEG or over pixels, in native code.

Stands in for the first operations of a list where they are of a known form: the pixels are those of
the operations themselves, and so are their random draws. Without the extension, and for whatever it
does not take (PNG, CMYK, damaged files), the operations run as they are.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import preprocess
from vit_jax.data.ops.decode import MAX_PIXELS
from vit_jax.data.ops.transforms import (
    CentralCrop,
    Decode,
    Features,
    FlipLr,
    InceptionCrop,
    Random,
    Resize,
    ResizeSmall,
    Transform,
)

try:
    from vit_jax.data import _jpeg  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # installed without a compiler, or without libjpeg-turbo
    extension: Any = None
else:
    extension = _jpeg


class Plan(NamedTuple):
    """What to make of an image: a part of it, resized to `full`, and of that a window."""

    part: tuple[int, int, int, int]  # top, left, height, width
    full: tuple[int, int]  # height, width
    window: tuple[int, int, int, int]


class Target(threading.local):
    """Where a thread wants its next images, and the work on these that waits.

    A thread that comes back from the extension may have to wait for the interpreter. It goes there
    for many images at a time if it can.

    Attributes:
      row: memory for the next image; operations may heed it or not.
      jobs: that wait, for the extension; None if images are wanted at once.
    """

    def __init__(self) -> None:
        self.row: np.ndarray | None = None
        self.jobs: list[tuple] | None = None

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """The row if it has this shape, else other memory."""
        if self.row is not None and self.row.shape == shape:
            return self.row
        return np.empty(shape, np.uint8)

    def run(self) -> list[bool]:
        """Runs the jobs that wait; False for each image that is left to the operations."""
        jobs, self.jobs = self.jobs, None
        return extension.decode(jobs) if jobs else []


@dataclasses.dataclass(frozen=True)
class Fused(Random):
    """`decode`, operations that crop and resize, and `flip_lr` if there is one, as one operation.

    Attributes:
      ops: what it stands in for.
      target: takes its images.
      last: whether no operation follows, so that the work may wait.
    """

    ops: tuple[Transform | Random, ...]
    target: Target
    last: bool

    def __call__(self, features: Features, rng: np.random.Generator) -> Features:
        source = features["image"]
        size = self._size(source)
        if size is not None:
            state = rng.bit_generator.state
            height, width = size
            plan = _plan(self.ops[1:], height, width, rng)
            if plan is not None:
                flip = isinstance(self.ops[-1], FlipLr) and self.ops[-1].draw(rng)
                image = self.target.allocate((*plan.window[2:], 3))
                job = (source, image, *plan, flip)
                if self._put_off(job) or extension.decode([job])[0]:
                    return features | {"image": image}
            rng.bit_generator.state = state
        return preprocess.apply(self.ops, features, rng)

    def _put_off(self, job: tuple) -> bool:
        jobs, row = self.target.jobs, self.target.row
        if jobs is None or not self.last or job[1] is not row:
            return False
        jobs.append(job)
        return True

    def _size(self, source: bytes | np.ndarray) -> tuple[int, int] | None:
        """Height and width; None for what the extension does not take."""
        if isinstance(source, np.ndarray):
            return source.shape[0], source.shape[1]
        known = extension.size(source)
        if known is None or (known[2] and self.ops[0] == Decode(orient=True)):
            return None
        return known[:2]


def fuse(
    ops: Sequence[Transform | Random], *, target: Target | None = None
) -> tuple[Transform | Random, ...]:
    """The same operations, of which the first are one if they have a known form.

    Known are `decode|inception_crop(N)`, `decode|resize(N)` and
    `decode|resize_small(N)|central_crop(M)`, bilinear, each with `|flip_lr` or without.

    Args:
      ops: of a preprocessing line.
      target: where the images of the first operation are to be; None for anywhere.
    """
    if extension is None or not ops or not isinstance(ops[0], Decode):
        return tuple(ops)
    kinds = tuple(type(op) for op in ops[1:])
    for form in ((InceptionCrop,), (Resize,), (ResizeSmall, CentralCrop)):
        # Other ways to resize are not those of the extension.
        if kinds[: len(form)] == form and getattr(ops[1], "method", None) == "bilinear":
            end = 1 + len(form)
            end += kinds[end - 1 : end] == (FlipLr,)
            fused = Fused(tuple(ops[:end]), target or Target(), last=end == len(ops))
            return (fused, *ops[end:])
    return tuple(ops)


def _plan(ops: Sequence[Any], height: int, width: int, rng: np.random.Generator) -> Plan | None:
    """What the operations make of an image of this size; None where they must tell what's wrong."""
    whole = (0, 0, height, width)
    first = ops[0]
    if isinstance(first, InceptionCrop):
        full = (first.size, first.size)
        return Plan(first.draw(height, width, rng), full, (0, 0, *full))
    if isinstance(first, Resize):
        full = (first.height, first.width or first.height)
        return Plan(whole, full, (0, 0, *full))
    full = first.shape(height, width)
    size = (ops[1].height, ops[1].width or ops[1].height)
    if full[0] * full[1] > MAX_PIXELS or size[0] > full[0] or size[1] > full[1]:
        return None
    top, left = (full[0] - size[0]) // 2, (full[1] - size[1]) // 2
    return Plan(whole, full, (top, left, *size))
