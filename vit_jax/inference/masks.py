# SPDX-License-Identifier: Apache-2.0
"""What a model predicts for each pixel of images: masks of classes, and depths."""

import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from vit_jax.data.ops.decode import decode_image
from vit_jax.data.ops.transforms import Decode, Resize, ResizeLong, ResizeSmall
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.data.sources.label_maps import SCALE
from vit_jax.inference.images import Preparation, read_image
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import write_atomically
from vit_jax.utils.palette import color_classes, color_depth, make_palette
from vit_jax.utils.text import printable

if TYPE_CHECKING:
    from vit_jax.inference.model import LoadedModel

# Images whose logits are computed at a time: they are large.
BATCH_SIZE = 8
_SHOWN = 3  # classes of an image in its `repr`
_OPACITY = 0.55
# Values of depths in the tables of `predict`, and the number that is one metre in a PNG.
DEPTHS = ("nearest", "mean", "farthest")
MILLIMETRES = 1000


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImageMask:
    """The class of each pixel of an image. `numpy.asarray` returns `classes`.

    Attributes:
      path: path of its file; None for an image in memory.
      classes: uint8 `[height, width]`.
      class_names: the name of each class.
      image: uint8 `[height, width, 3]`.
    """

    path: str | None
    classes: np.ndarray
    class_names: Sequence[str]
    image: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """The share of the pixels that each class has, float32 `[num_classes]`."""
        counts = np.bincount(self.classes.ravel(), minlength=len(self.class_names))
        return (counts / self.classes.size).astype(np.float32)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` classes with the most pixels as (name, share), without those that have none."""
        shares = self.shares
        order: list[int] = np.argsort(-shares, kind="stable")[:k].tolist()
        return [(self.class_names[i], float(shares[i])) for i in order if shares[i]]

    def overlay(self, opacity: float = _OPACITY) -> Image.Image:
        """The image below the colours of the classes, which have the weight `opacity`, 0 to 1."""
        colors = Image.fromarray(color_classes(self.classes))
        return Image.blend(Image.fromarray(self.image), colors, opacity)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a PNG with a palette, whose values are the numbers of the classes."""
        write_atomically(Path(path), self.encode())

    def encode(self) -> bytes:
        """The content of the file that `save` writes."""
        picture = Image.fromarray(self.classes).convert("P")
        picture.frombytes(np.ascontiguousarray(self.classes).tobytes())
        picture.putpalette(make_palette().ravel().tolist())
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()

    def encode_overlay(self) -> bytes:
        """The overlay as a JPEG file: a PNG of a photo is larger and takes seconds."""
        stream = io.BytesIO()
        self.overlay().save(stream, "JPEG", quality=90)
        return stream.getvalue()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.classes, dtype, copy=copy)

    def __repr__(self) -> str:
        classes = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.top(_SHOWN))
        return f"{'image' if self.path is None else printable(self.path)}: {classes}"


def make_mask(model: "LoadedModel", image: Any, logits: np.ndarray) -> ImageMask:
    """Makes the mask of an image from its logits, as an evaluator with `label_size` does.

    Args:
      model: which gave them.
      image: a path, the bytes of a file or a Pillow image.
      logits: a row of `model.pixel_outputs`, of the image after `model.preprocess`. Where that only
        resizes, the mask has the size of the image; otherwise it is that of the prepared image.
    """
    path, pixels = _read(model, image)
    classes = find_classes(logits, model.image_shape[:2], pixels.shape[:2])
    names = [model.name_of(number) for number in range(model.num_classes)]
    return ImageMask(path, classes, names, pixels)


def _read(model: "LoadedModel", image: Any) -> tuple[str | None, np.ndarray]:
    """The path of an image, and the pixels that its results are for, see `make_mask`."""
    if resizes_only(model.preparation):
        first: Any = parse_preprocess(model.preparation.line, key="preprocess")[0]
        pixels = decode_image(read_image(image), orient=first.orient)
    else:
        pixels = model.preprocess(image)
    return os.fspath(image) if isinstance(image, str | os.PathLike) else None, pixels


def resizes_only(preparation: Preparation) -> bool:
    """Whether a prepared image shows all of the image, and nothing else."""
    ops = parse_preprocess(preparation.line, key="preprocess")
    whole = (Resize, ResizeSmall, ResizeLong)
    return isinstance(ops[0], Decode) and all(isinstance(op, whole) for op in ops[1:])


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImageDepth:
    """The depth of each pixel of an image. `numpy.asarray` returns `depth`.

    Attributes:
      path: path of its file; None for an image in memory.
      depth: in metres, float32 `[height, width]`.
      image: uint8 `[height, width, 3]`.
    """

    path: str | None
    depth: np.ndarray
    image: np.ndarray

    @property
    def summary(self) -> np.ndarray:
        """The depths that `DEPTHS` names, in metres, float32 `[3]`."""
        return np.array([self.depth.min(), self.depth.mean(), self.depth.max()], np.float32)

    def picture(self) -> Image.Image:
        """The depths as colours: the nearest is light, the farthest dark."""
        return Image.fromarray(color_depth(self.depth, self.depth.min(), self.depth.max()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes millimetres to a PNG of 16 bits, or metres to an `.npy` file.

        A PNG holds up to 65.535 m; what is farther is clipped. Raises `UserError` for another
        ending.
        """
        ending = Path(path).suffix.lower()
        if ending not in (".png", ".npy"):
            raise UserError(f"{path}: expected a name that ends in .png or .npy")
        write_atomically(Path(path), self._encode_array() if ending == ".npy" else self.encode())

    def encode(self) -> bytes:
        """The content of the PNG that `save` writes."""
        millimetres = np.rint(self.depth * MILLIMETRES).clip(0, 2**16 - 1).astype(np.uint16)
        stream = io.BytesIO()
        Image.fromarray(millimetres).save(stream, "PNG")
        return stream.getvalue()

    def _encode_array(self) -> bytes:
        stream = io.BytesIO()
        np.save(stream, self.depth)
        return stream.getvalue()

    def encode_picture(self) -> bytes:
        """The picture as a JPEG file."""
        stream = io.BytesIO()
        self.picture().save(stream, "JPEG", quality=90)
        return stream.getvalue()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.depth, dtype, copy=copy)

    def __repr__(self) -> str:
        name = "image" if self.path is None else printable(self.path)
        nearest, _, farthest = self.summary
        return f"{name}: {nearest:.2f} to {farthest:.2f} m"


def make_depth_image(model: "LoadedModel", image: Any, depth: np.ndarray) -> ImageDepth:
    """Makes the depth of an image from a row of `model.pixel_outputs`.

    The arguments and the size of the result are those of `make_mask`.
    """
    path, pixels = _read(model, image)
    return ImageDepth(path, resize_depth(depth, model.image_shape[:2], pixels.shape[:2]), pixels)


def make_pixel_result(
    model: "LoadedModel", image: Any, outputs: np.ndarray
) -> ImageMask | ImageDepth:
    """The mask or the depth of an image, by what the model finds; see `make_mask`."""
    if model.segmentation is None:
        return make_depth_image(model, image, outputs)
    return make_mask(model, image, outputs)


def resize_depth(depth: np.ndarray, *sizes: tuple[int, ...]) -> np.ndarray:
    """Resizes float32 `[rows, columns, 1]` bilinearly to one size after another.

    Of several, `[views, rows, columns, 1]`, it is the mean. Returns float32 of the last size.
    """
    views = depth.reshape(-1, *depth.shape[-3:])
    resized = [_resize_plane(view[..., 0], sizes) for view in views]
    return np.stack(resized).mean(axis=0)


def find_classes(logits: np.ndarray, *sizes: tuple[int, ...]) -> np.ndarray:
    """The class of each pixel, uint8 of the last size, of logits.

    The logits are resized class by class: those of all classes may not fit in memory.

    Args:
      logits: float32 `[rows, columns, classes]`, or several, `[views, rows, columns, classes]`,
        whose probabilities are averaged.
      sizes: height and width to which the logits are resized bilinearly, one after another.
    """
    views = logits.reshape(-1, *logits.shape[-3:])
    numbers = range(logits.shape[-1])

    def resize(number: int) -> list[np.ndarray]:
        return [_resize_plane(view[..., number], sizes) for view in views]

    # The divisors of the probabilities, which matter where several are averaged.
    divisors = [np.full(sizes[-1], -np.inf, np.float32)] * len(views)
    for number in numbers if len(views) > 1 else ():
        divisors = [np.logaddexp(*pair) for pair in zip(divisors, resize(number), strict=True)]
    best = np.full(sizes[-1], -np.inf, np.float32)
    classes = np.zeros(sizes[-1], np.uint8)
    for number in numbers:
        values = resize(number)
        if len(views) > 1:
            values = [np.exp(x - total) for x, total in zip(values, divisors, strict=True)]
        score = sum(values[1:], values[0])
        higher = score > best
        best[higher], classes[higher] = score[higher], number
    return classes


def _resize_plane(plane: np.ndarray, sizes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Resizes float32 `[rows, columns]` to one size after another, as `dense.resize_logits`."""
    plane = np.ascontiguousarray(plane, np.float32)
    for height, width in sizes:
        # Unlike Pillow, OpenCV does not antialias here.
        plane = cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR)
    return plane


class MaskFolder:
    """Writes masks to a folder: `x.png` and `x_overlay.jpg` for `x.jpg`, or `x_depth.jpg`.

    An image with the name of an earlier one gets a number behind it.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._used: set[str] = set()

    def write(self, mask: ImageMask | ImageDepth) -> None:
        """Writes the files of one image; the first makes the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = printable(Path(mask.path or "image").stem)
        name, number = stem, 1
        while name in self._used:
            number += 1
            name = f"{stem}_{number}"
        self._used.add(name)
        mask.save(self._folder / f"{name}.png")
        if isinstance(mask, ImageDepth):
            write_atomically(self._folder / f"{name}_depth.jpg", mask.encode_picture())
            write_atomically(self._folder / SCALE, f"{MILLIMETRES}\n".encode())
        else:
            write_atomically(self._folder / f"{name}_overlay.jpg", mask.encode_overlay())
