# SPDX-License-Identifier: Apache-2.0
"""Batches as arithmetic of position.

The example at position p of the endless training stream, and every random choice made for it, are
functions of (seed, p). Step s takes positions s*B to (s+1)*B, and each host takes some blocks of
these: batches are the same for any number of hosts, and resuming is starting at another step.
"""

import abc
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vit_jax.data.classes import Classes, match_labels, relabel
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.loader import Loader, count_ahead, count_threads
from vit_jax.data.mixture import Mixture, Schedule, make_schedule, merge_infos
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.ops.fused import Job, decode, defer, fuse
from vit_jax.data.ops.patches import find_patches
from vit_jax.data.ops.policies import Luma
from vit_jax.data.ops.transforms import Decode, Features, Keep, Op, Random, apply, name_label_map
from vit_jax.data.order import (
    BUDGETS,
    CAPTIONS,
    ROWS,
    Mixed,
    Order,
    PositionRng,
    RepeatedAugmentation,
    WindowShuffled,
    shuffled,
)
from vit_jax.data.preprocess import parse_preprocess
from vit_jax.data.rows import ALONE, Packing, Row, blank_row
from vit_jax.data.sources import dataset_info, find_dataset, open_source
from vit_jax.data.sources.base import IGNORED, Dataset, DatasetInfo, Source
from vit_jax.data.tokenizers import Tokenizer, parse_tokenizer
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import is_part, report_failure
from vit_jax.utils.text import describe_size

Batch = dict[str, np.ndarray]

# Features with a meaning of their own, which no view may have as its name.
_OWN_FEATURES = (
    *("image", "label", "label_map", "extent", "mask", "text", "caption", "tokens"),
    *("places", "grids"),
)
# Arguments of random operations that scale an image, and what is drawn for it, with its size.
_SCALES = ("size", "height", "width", "pixels", "method")


@dataclasses.dataclass(frozen=True)
class StoredFeatures:
    """Features of the images of a split, in a file.

    Attributes:
      name: of the features in a batch.
      width: of the features.
      path: a file of numpy, float32 `[records, width]`, in the order of the records, with NaN for
        images that can't be read; None as long as there is none.
    """

    name: str
    width: int
    path: Path | None


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """One split of a dataset, or a mixture of several, and how its examples are prepared.

    Attributes:
      name: see `vit_jax.data.sources`.
      split: with slices, such as `train[:98%]`.
      preprocess: see `vit_jax.data.preprocess`.
      batch_size: of all hosts together.
      data_dir: where TFDS keeps its datasets; None for its default.
      key: the config section, for errors.
      num_threads: threads that decode and crop; 0 uses the caller's, None is one per core.
      mixture: (name, split, weight) of each source to mix, in place of `name` and `split`.
      split_key: the key of the split in the config section, for errors.
      repeats: copies of each image in a training batch, each with its own augmentation.
      views: (name, count, line) of more images that are made of each record, by a preprocessing
        line of their own; the record is decoded once.
      same_draws: names of views whose images repeat, in turn, the random numbers of the first image
        and of the views before: the same crops of an image at another size, for example.
      max_ram_gb: limit of `plan_buffers`, in 10**9 bytes.
      classes: those whose labels the examples have, by the names of their classes; None for the
        labels of the data, or of the source of a mixture with the most classes.
      tokenizer: see `vit_jax.data.tokenizers`: makes the `tokens` of captions; None for none.
      label_size: height and width of label maps that keep the size of their masks and are padded
        to these; None for label maps that change like their images.
      budgets: (budget, batch size) of patches of images of any size, which training batches take in
        turn, in another order in each round; `()` for the budget of `preprocess` in all.
      budget: of patches, in place of that of `preprocess`; None for that.
      features: of the images, which training batches have in place of images and labels.
      packing: how training images share rows of as many patches as the budget of `preprocess`.
      shuffle_window: records of which shuffled shards are shuffled at a time in training; 0 for all
        records of an epoch.
    """

    name: str
    split: str
    preprocess: str
    batch_size: int
    data_dir: str | None
    key: str
    num_threads: int | None = None
    mixture: tuple[tuple[str, str, float], ...] = ()
    split_key: str = "split"
    repeats: int = 1
    views: tuple[tuple[str, int, str], ...] = ()
    same_draws: tuple[str, ...] = ()
    max_ram_gb: float | None = None
    classes: Classes | None = None
    tokenizer: str | None = None
    label_size: tuple[int, int] | None = None
    budgets: tuple[tuple[int, int], ...] = ()
    budget: int | None = None
    features: StoredFeatures | None = None
    packing: Packing = ALONE
    shuffle_window: int = 0

    @property
    def rows_per_batch(self) -> int:
        """The length of the first dimension of a batch's arrays."""
        return self.batch_size // self.packing.images_per_row

    def check_packing(self) -> None:
        """Raises `UserError` unless images can share rows as `packing` has it."""
        images, last = self.packing.images_per_row, find_patches(self.ops())
        if images == 1:
            return
        where = f"{self.key}.images_per_row={images}"
        if last is None:
            raise UserError(
                f"{where}: expected {self.key}.preprocess to end in patches(SIZE, BUDGET), where "
                "BUDGET is the number of patches of a row"
            )
        for name in ("budgets", "views", "tokenizer"):
            if given := getattr(self, name):
                raise UserError(f"{where} with {self.key}.{name}={given}: expected one of the two")
        if self.batch_size % images:
            raise UserError(
                f"{where} does not divide {self.key}.batch_size={self.batch_size}, which is the "
                "number of images"
            )
        self.packing.check(last.budget)
        most = int(last.budget / (1 - self.packing.drop_patches[1]))
        try:
            dataclasses.replace(last, budget=most)
        except ValueError as e:
            rates = self.packing.drop_patches
            raise UserError(f"{self.key}.drop_patches={rates}: before these, {e}") from None

    def check_window(self) -> None:
        """Raises `UserError` unless the data is stored in shards, which `shuffle_window` needs."""
        for name in [name for name, *_ in self.mixture] or [self.name]:
            dataset = find_dataset(name, data_dir=self.data_dir) if self.shuffle_window else None
            if dataset and not (isinstance(dataset, Dataset) and dataset.in_shards):
                raise UserError(
                    f"{self.key}.shuffle_window={self.shuffle_window}: {name} is not stored in "
                    "shards; expected data as of tar:, packed: or raw:, or 0 to shuffle all records"
                )

    def variants(self) -> tuple["DatasetSpec", ...]:
        """The spec of each of the `budgets`; itself alone without.

        Raises `UserError` if the line makes no patches of images of any size, if a number is not
        positive, or if images are repeated.
        """
        if not self.budgets:
            return (self,)
        if find_patches(self.ops()) is None or self.repeats > 1:
            raise UserError(
                f"{self.key}.budgets={self.budgets}: expected {self.key}.preprocess to end in "
                "patches(SIZE, BUDGET), and repeats=1"
            )
        if min(min(pair) for pair in self.budgets) < 1:
            raise UserError(
                f"{self.key}.budgets={self.budgets}: expected a number of patches and of images of "
                "at least 1 in each, such as (256, 1024)"
            )
        return tuple(
            dataclasses.replace(self, budgets=(), budget=budget, batch_size=batch_size)
            for budget, batch_size in self.budgets
        )

    @property
    def images_per_step(self) -> float:
        """The size of a training batch, the mean over the `budgets`."""
        sizes = [size for _, size in self.budgets] or [self.batch_size]
        return self.batch_size if not self.budgets else sum(sizes) / len(sizes)

    @property
    def info(self) -> DatasetInfo:
        """Classes, of which some may have no examples, and image shape before preprocessing.

        Raises `UserError` if the classes of the data and those of `classes`, or of the sources of a
        mixture, can't be matched.
        """
        names = [name for name, *_ in self.mixture] or [self.name]
        infos = [dataset_info(name, data_dir=self.data_dir) for name in names]
        info = merge_infos(infos, names, key=f"{self.key}.mixture")
        if self.classes is None or not info.num_classes:
            return info
        match_labels(Classes.of(info, str(self)), self.classes, key=self.key)
        count, class_names = self.classes.count, self.classes.names
        return dataclasses.replace(info, num_classes=count, class_names=class_names)

    def match(self, classes: Classes, *, key: str) -> tuple["DatasetSpec", str]:
        """Gives the examples the labels that their classes have among others.

        Returns the new spec, and a line on how classes were matched, which is empty if all labels
        stay as they are. Raises `UserError`, with the config key, if they can't be matched.
        """
        own = Classes.of(self.info, str(self))
        labels, note = match_labels(own, classes, key=key)
        if classes.names is None and list(labels) == list(range(classes.count)):
            return self, note  # The data may have names, which the others lack.
        return dataclasses.replace(self, classes=classes), note

    def ops(self) -> tuple[Op, ...]:
        """The operations of `preprocess`, with the `budget`."""
        ops = parse_preprocess(self.preprocess, key=f"{self.key}.preprocess")
        if self.budget is None or (last := find_patches(ops)) is None:
            return ops
        return *ops[:-1], dataclasses.replace(last, budget=self.budget)

    def find_tokenizer(self) -> Tokenizer | None:
        """What makes `tokens` of captions; None without `tokenizer`, or for data without captions.

        Raises `UserError` if `tokenizer` can't be parsed.
        """
        if self.tokenizer is None or not self.info.captions:
            return None
        return parse_tokenizer(self.tokenizer)

    def blank(self) -> Features:
        """A row of a batch, of zeros: an example, or several with `packing`.

        These are `image` uint8 `[h, w, c]`; `label` int32 or float32 `[num_classes]`, if there are
        labels; `label_map` `[h, w]`, if pixels have classes (uint8) or depths (float32); `tokens`
        int32 `[length]`, if captions are tokenized; and the `views`, uint8 `[count, h, w, c]`.
        `label_size` is the size of `label_map`, if it is given, and `extent` int32 `[6]` then has
        the top, left, height and width of the part of the image that is not padding, and the height
        and width of the mask.
        """
        if self.features is not None:
            blank: Features = {self.features.name: np.zeros(self.features.width, np.float32)}
            if tokenizer := self.find_tokenizer():
                blank["tokens"] = np.zeros(tokenizer.length, np.int32)
            return blank
        info = self.info
        features: Features = {"image": np.zeros(self.image_shape(), np.uint8)}
        if info.multi_label:
            features["label"] = np.zeros(info.num_classes, np.float32)
        elif info.num_classes:
            features["label"] = np.int32(0)
        if info.unlabelled is not None:
            size = self.label_size or features["image"].shape[:2]
            features["label_map"] = np.full(size, info.unlabelled)
            if self.label_size:
                features["extent"] = np.zeros(6, np.int32)
        for op in self.ops():
            features = op(features) if isinstance(op, Keep) else features
        for name, shape in self.view_shapes().items():
            features[name] = np.zeros(shape, np.uint8)
        if tokenizer := self.find_tokenizer():
            features["tokens"] = np.zeros(tokenizer.length, np.int32)
        if (images := self.packing.images_per_row) > 1:
            row = blank_row(features.pop("image"), images)
            features = row | {name: np.stack([x] * images) for name, x in features.items()}
        return features

    def view_ops(self) -> dict[str, tuple[Op, ...]]:
        """The operations of each of the `views`, by its name."""
        return {
            name: parse_preprocess(line, key=self._view_key(name)) for name, _, line in self.views
        }

    def view_shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """The number of images of each of the `views`, and their height, width and channels.

        Raises `UserError` if a name or a number is not valid, or if a line does not decode as
        `preprocess` does, refuses images of the data, or gives images that differ in shape.
        """
        shapes: dict[str, tuple[int, int, int, int]] = {}
        for name, count, line in self.views:
            key = self._view_key(name)
            if not name.isidentifier() or name in (*_OWN_FEATURES, *shapes):
                raise UserError(
                    f"{self.key}.views: a view is named {name!r}; expected different names of "
                    f"letters, and none of {', '.join(_OWN_FEATURES)}"
                )
            if count < 1:
                raise UserError(f"{key}: {count} images of each record: expected at least 1")
            found = find_shapes(line, self.info.image_shape, key=key)
            if parse_preprocess(line, key=key)[0] != self.ops()[0]:
                raise UserError(
                    f"{key}={line!r}: expected it to start as {self.key}.preprocess does, since "
                    "each image is decoded once"
                )
            if len(found) > 1:
                raise UserError(
                    f"{key}={line!r} leaves images of {self} in different sizes: add resize(SIZE) "
                    "or a crop"
                )
            shapes[name] = (count, *found.pop())
        for name in self.same_draws:
            self._check_same_draws(name)
        return shapes

    def _check_same_draws(self, name: str) -> None:
        """Raises `UserError` unless the images before those of a view show the same parts."""
        key, names = f"{self.key}.same_draws", [view for view, *_ in self.views]
        if name not in names:
            raise UserError(
                f"{key}={self.same_draws}: {name!r} is none of {self.key}.views: expected one of "
                f"{', '.join(names) or 'none, without views'}"
            )
        place = names.index(name)
        drawn = (v for v in self.views[:place] if v[0] not in self.same_draws)
        before = 1 + sum(count for _, count, _ in drawn)
        if (count := self.views[place][1]) > before:
            raise UserError(
                f"{key}={self.same_draws}: {count} images of {self._view_key(name)} are to repeat "
                f"the draws of the {before} before them: expected at most {before}"
            )
        lines = [("preprocess", self.preprocess)]
        for view, number, line in self.views[:place]:
            if view not in self.same_draws:
                lines += [(f"views.{view}", line)] * number
        own = self.views[place][2]
        moves = _find_moves(parse_preprocess(own, key=self._view_key(name)))
        for part, line in lines[:count]:
            if _find_moves(parse_preprocess(line, key=f"{self.key}.{part}")) != moves:
                raise UserError(
                    f"{key}={self.same_draws}: {self._view_key(name)}={own!r} would show other "
                    f"parts of the image than {self.key}.{part}={line!r}: expected the same random "
                    "crops, shifts and flips in both, but for sizes, before random colours"
                )

    def _view_key(self, name: str) -> str:
        return f"{self.key}.views.{name}"

    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of preprocessed images, without reading any.

        Raises `UserError` if the line does not decode first, or if its images differ in shape.
        """
        shapes = find_shapes(
            self.preprocess,
            self.info.image_shape,
            key=f"{self.key}.preprocess",
            with_maps=self.info.unlabelled is not None,
        )
        if len(shapes) > 1:
            raise UserError(
                f"{self.key}.preprocess={self.preprocess!r} leaves images of {self} in "
                "different sizes: add resize(SIZE) or a crop"
            )
        shape = shapes.pop()
        last = None if self.budget is None else find_patches(self.ops())
        return shape if last is None else (last.size * (1 + last.budget), *shape[1:])

    def open(self) -> Source:
        """The records; those of a mixture are concatenated."""
        parts = self.mixture or ((self.name, self.split, 1.0),)
        key = f"{self.key}.{'mixture' if self.mixture else self.split_key}"
        if tokenizer := self.find_tokenizer():
            _ = tokenizer.vocabulary  # It is read before anything else.
        classes, sources = Classes.of(self.info, str(self)), []
        for name, split, _ in parts:
            source = open_source(name, split, data_dir=self.data_dir, key=key)
            own = Classes.of(dataset_info(name, data_dir=self.data_dir), name)
            sources.append(relabel(source, own, classes, key=key) if classes.count else source)
        return Mixture(sources) if self.mixture else sources[0]

    def read_features(self) -> np.ndarray | None:
        """Maps the file of `features` into memory, float32 `[records, width]`; None without one.

        Raises `UserError` if it can't be read, or is of another number of records.
        """
        if self.features is None:
            return None
        path, shape = self.features.path, (len(self.open()), self.features.width)
        if path is None:
            raise ValueError("the features of the images have not been computed")
        try:
            found = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"{path} can't be read: {e}; remove it, and it is made again") from None
        if found.shape != shape or found.dtype != np.float32:
            raise UserError(
                f"{path} has {found.dtype} {found.shape}: expected float32 {shape}; remove it, and "
                "it is made again"
            )
        return found

    def schedule(self) -> Schedule:
        """The source of the mixture that each position takes."""
        weights = tuple(weight for *_, weight in self.mixture)
        return make_schedule(weights, key=f"{self.key}.mixture")

    def __str__(self) -> str:
        return ", ".join(name for name, *_ in self.mixture) or self.name


def find_shapes(
    line: str, image_shape: tuple[int | None, ...], *, key: str, with_maps: bool = False
) -> set[tuple[int, int, int]]:
    """Height, width and channels of the images that a preprocessing line returns.

    It runs on two blank images of the dataset's `image_shape`, with sides of their own where that
    is None; several results mean that the shape depends on the size. The images have label maps
    `with_maps`. Raises `UserError`, with the config key of the line, if this does not start with
    `decode`, repeats it, or treats a label map otherwise than its image.
    """
    ops = parse_preprocess(line, key=key)
    if [isinstance(op, Decode) for op in ops] != [True] + [False] * (len(ops) - 1):
        raise UserError(f"{key}={line!r}: expected 'decode' first, and once")
    if any(isinstance(op, Luma) for op in ops[:-1]):
        raise UserError(
            f"{key}={line!r}: expected 'luma' last, since other operations are for three channels"
        )
    shapes = set()
    for fill in ((64, 96), (600, 400)):
        sides = [side or other for side, other in zip(image_shape[:2], fill, strict=True)]
        blank = cv2.imencode(".png", np.zeros((*sides, 3), np.uint8))[1].tobytes()
        features, rng = {"image": blank, "label": np.int32(0)}, np.random.default_rng(0)
        if with_maps:
            features["label_map"] = np.zeros(sides, np.uint8)
        for text, op in zip(line.split("|"), ops, strict=True):
            features = _try_op(op, text.strip(), features, rng, key=key)
            check_map(features, f"{key}: {text.strip()!r}")
        shapes.add(features["image"].shape)
    return shapes


def _find_moves(ops: Iterable[Op]) -> list[Any]:
    """The random operations up to the last that moves pixels, without what scales an image."""
    drawn = [op for op in ops if isinstance(op, Random)]
    while drawn and drawn[-1].maps == "keep":
        drawn.pop()
    return [
        (type(op), [(k, v) for k, v in sorted(vars(op).items()) if k not in _SCALES])
        for op in drawn
    ]


def check_map(features: Features, where: str) -> None:
    """Raises `UserError` if a label map is not as large as its image, or of another type."""
    label_map, image = features.get("label_map"), features["image"]
    if label_map is None or (
        label_map.shape == image.shape[:2] and label_map.dtype in (np.uint8, np.float32)
    ):
        return
    raise UserError(
        f"{where} made a label_map of {label_map.dtype} {label_map.shape} for an image of "
        f"{image.shape}: expected uint8 or float32 {image.shape[:2]}"
    )


def _try_op(
    op: Op, text: str, features: Features, rng: np.random.Generator, *, key: str
) -> Features:
    """Runs an operation on a blank image.

    Raises `UserError` if it refuses the image, or is a part that fails or gives no image.
    """
    name = text.partition("(")[0]
    where = f"{key}: {text!r}"
    if not is_part(name):
        try:
            return apply([op], features, rng)
        except (ImageError, UserError) as e:
            raise UserError(f"{where}: {e}") from None
    with report_failure(where, name):
        features = apply([op], features, rng)
    image = features.get("image") if isinstance(features, dict) else None
    if not isinstance(image, np.ndarray) or image.ndim != 3:
        what = "an image of another shape" if isinstance(image, np.ndarray) else "no image"
        raise UserError(
            f"{where} gives {what} in a {type(features).__name__}; expected a dict of features "
            "with 'image', [height, width, channels]"
        )
    return features


# Records that are tried for one position: if none of so many can be read, the storage is at fault.
_TRIES = 100

# Bytes of encoded images that a thread collects before it decodes them.
_MAX_ENCODED = 1 << 24

# `apply` or `defer`.
_Apply = Callable[[Sequence[Op], Features, np.random.Generator], Features]


class _Batches(abc.ABC):
    """Fills batches with the examples of their positions.

    All threads share it, and it never changes: what a thread has begun is local to its `fill`.

    Attributes:
      rows: the place in the global batch of each row of this process.
      blank: the example to use where no record can be read.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        shards: tuple[int, ...],
        num_shards: int,
        corrupt: CorruptCounter | None,
        *,
        seed: int,
    ):
        block = spec.rows_per_batch // num_shards
        self.spec, self.source, self.ops = spec, spec.open(), fuse(spec.ops())
        self.rngs, self.blank = PositionRng(seed), spec.blank()
        self.features = spec.read_features()
        self.tokenizer = spec.find_tokenizer()
        self.decode, counts = spec.ops()[0], {name: count for name, count, _ in spec.views}
        self.views = {name: (counts[name], fuse(ops)) for name, ops in spec.view_ops().items()}
        self.rows = [shard * block + i for shard in shards for i in range(block)]
        self.ahead = plan_buffers(spec, num_shards=num_shards, shards=len(shards)).ahead
        self.corrupt = corrupt or CorruptCounter()

    @abc.abstractmethod
    def example(self, position: int, apply: _Apply) -> Features:
        """The example of a position, with the operations run by `apply`."""

    def load(self, steps: Iterable[int]) -> Loader[Batch]:
        """The batches of steps, in order."""
        return Loader(
            steps,
            make=self.make,
            fill=self.fill,
            rows=len(self.rows),
            num_threads=count_threads(self.spec.num_threads),
            ahead=self.ahead,
            announce=self.announce if self.announces else None,
        )

    @property
    def announces(self) -> bool:
        """Whether `announce` does something."""
        return self.source.reads_ahead

    def announce(self, step: int) -> None:
        """Starts to read the records of a step, before threads ask for them one by one."""
        found = (self.index(position) for position in self.positions(step))
        indices = [index for index in found if index is not None]
        self.source.ahead(indices, captions=self.tokenizer is not None)

    def positions(self, step: int) -> Iterable[int]:
        """The positions of the examples of a step that are read here."""
        return (self.first(step) + row for row in self.rows)

    @abc.abstractmethod
    def index(self, position: int) -> int | None:
        """The record at a position; None if there is none."""

    def make(self, step: int) -> Batch:
        """Memory for a batch."""
        return {k: np.empty((len(self.rows), *v.shape), v.dtype) for k, v in self.blank.items()}

    def fill(self, batch: Batch, step: int, start: int, stop: int) -> None:
        """Fills rows `start` to `stop` of the batch of a step.

        JPEGs are collected and decoded in one call: whenever a thread returns from native code, it
        may have to wait for the interpreter.
        """
        jobs: dict[int, Job] = {}
        encoded = 0
        for row in range(start, stop):
            image = self._fill_row(batch, step, row, defer)
            if isinstance(image, Job):
                jobs[row] = image
                encoded += len(image.source)
            if encoded > _MAX_ENCODED or row == stop - 1:
                made = decode(jobs.values(), (batch["image"][row] for row in jobs))
                for failed in itertools.compress(jobs, np.logical_not(made)):
                    self._fill_row(batch, step, failed, apply)
                jobs, encoded = {}, 0
        self.corrupt.see(stop - start)

    def _fill_row(
        self, batch: Batch, step: int, row: int, apply: _Apply
    ) -> np.ndarray | Job | None:
        """Fills a row and returns its image, which may be a `Job` that is still to be run.

        It is None for stored features.
        """
        features = self.example(self.first(step) + self.rows[row], apply)
        image = features.get("image")
        for name in batch.keys() - {"image"}:
            batch[name][row] = features[name]
        if image is not None and not isinstance(image, Job):
            batch["image"][row] = image
        return image

    def first(self, step: int) -> int:
        """The position of the first example of the batch of a step."""
        return step * self.spec.batch_size

    def choose(self, captions: Sequence[str], position: int) -> str:
        """The caption of an example, of those that its image has."""
        return captions[0]

    def _prepare(
        self,
        index: int,
        position: int,
        rng: np.random.Generator,
        apply: _Apply,
        budget: int | None = None,
    ) -> Features:
        """The features of a record at a position, with a budget of patches of its own or without.

        Raises `ImageError` if its image is unreadable or refused, or if it has no caption.
        """
        if self.spec.features is not None and self.features is not None:
            stored = np.asarray(self.features[index])
            if np.isnan(stored[0]):
                raise ImageError("its features are missing, since it could not be read")
            return {self.spec.features.name: stored} | self._tokenize({}, index, position)
        record = self.source[index]
        own = record.get("label_map")
        if self.spec.label_size and own is not None:
            # Whatever is not padding afterwards is of the image.
            record = record | {"label_map": np.zeros(own.shape, np.uint8)}
            decode: Any = self.decode
            own = decode.turn(own, record["image"])
        if self.views:
            features = self._prepare_views(record, rng)
        else:
            ops, shape = self.ops, self.blank["image"].shape
            if budget is not None:
                last: Any = ops[-1]
                ops = (*ops[:-1], dataclasses.replace(last, budget=budget))
                shape = ((1 + budget) * last.size, *shape[1:])
            features = apply(ops, record, rng)
            if not isinstance(features["image"], Job):
                self._check(features["image"], "preprocess", shape)
                check_map(features, f"{self.spec.key}.preprocess")
        if self.spec.label_size and own is not None:
            features = features | self._keep_map(own, features["label_map"])
        return features | self._tokenize(record, index, position)

    def _tokenize(self, record: Features, index: int, position: int) -> Features:
        """The caption of a record and its tokens; nothing without a tokenizer."""
        if not self.tokenizer:
            return {}
        captions = record["text"] if "text" in record else self.source.captions(index)
        if not captions:
            raise ImageError("it has no caption")
        caption = self.choose(captions, position)
        return {"caption": caption, "tokens": self.tokenizer.encode(caption)}

    def _keep_map(self, own: np.ndarray, inside: np.ndarray) -> Features:
        """A label map of its own size, padded, and its extent.

        `inside` is `IGNORED` where the prepared image has padding, uint8 `[h, w]`.
        """
        (height, width), size = own.shape, self.spec.label_size or (0, 0)
        if height > size[0] or width > size[1]:
            raise ImageError(
                f"its {name_label_map(own)} has {width}x{height} pixels: expected at most "
                f"{size[1]}x{size[0]}, the width and height of {self.spec.key}.label_size"
            )
        label_map = np.full(size, self.spec.info.unlabelled)
        label_map[:height, :width] = own
        rows, columns = (np.flatnonzero((inside != IGNORED).any(axis=i)) for i in (1, 0))
        extent = (rows[0], columns[0], len(rows), len(columns), height, width)
        return {"label_map": label_map, "extent": np.array(extent, np.int32)}

    def _prepare_views(self, record: Features, rng: np.random.Generator) -> Features:
        """The features of a record with the images of the views, all of one decoded image."""
        decoded = apply([self.decode], record, rng)
        repeating, states = bool(self.spec.same_draws), []
        alone = {name: x for name, x in decoded.items() if name != "label_map"}

        def draw(ops: Sequence[Op], given: Features) -> Features:
            if repeating:
                states.append(rng.bit_generator.state)
            return apply(ops, given, rng)

        def repeat(ops: Sequence[Op], image: int) -> Features:
            now = rng.bit_generator.state
            rng.bit_generator.state = states[image]
            features = apply(ops, alone, rng)
            rng.bit_generator.state = now
            return features

        features = draw(self.ops, decoded)
        self._check(features["image"], "preprocess", self.blank["image"].shape)
        for name, (count, ops) in self.views.items():
            if name in self.spec.same_draws:
                images = [repeat(ops, i)["image"] for i in range(count)]
            else:
                images = [draw(ops, alone)["image"] for _ in range(count)]
            for image in images:
                self._check(image, f"views.{name}", self.blank[name].shape[1:])
            features |= {name: np.stack(images)}
        return features

    def _check(self, image: np.ndarray, key: str, shape: tuple[int, ...]) -> None:
        """Raises `ImageError` for an image of another size, and `UserError` for another kind."""
        if (image.shape, image.dtype) == (shape, np.uint8):
            return
        error = (
            ImageError if image.dtype == np.uint8 and image.shape[2:] == shape[2:] else UserError
        )
        lines = {f"views.{name}": line for name, _, line in self.spec.views}
        line = lines.get(key, self.spec.preprocess)
        raise error(
            f"{self.spec.key}.{key}={line!r} made an image of {image.dtype} {image.shape}; "
            f"expected uint8 {shape}"
        )


class _TrainBatches(_Batches):
    """Batches of the endless training stream."""

    def __init__(self, spec: DatasetSpec, *args: Any, seed: int):
        super().__init__(spec, *args, seed=seed)
        self.order = train_order(spec, self.source, seed=seed)
        self.caption_rngs = PositionRng(seed, stream=CAPTIONS)
        self.read_until = 0  # Windows up to this position have been read through.

    def choose(self, captions: Sequence[str], position: int) -> str:
        return captions[int(self.caption_rngs(position).integers(len(captions)))]

    def index(self, position: int) -> int | None:
        return self.order[position]

    @property
    def announces(self) -> bool:
        return self.source.reads_ahead or isinstance(self.order, WindowShuffled)

    def announce(self, step: int) -> None:
        if self.source.reads_ahead or not isinstance(self.order, WindowShuffled):
            super().announce(step)
        elif self.spec.features is None:
            # The window of the step, and the next one, so that it is in memory once it begins.
            now = self.order.window(self.first(step + 1) - 1)
            for window in (now, self.order.window(now.stop)):
                if window.start >= self.read_until:
                    self.read_until = window.stop
                    self.read_window(window)

    def read_window(self, window: range) -> None:
        """Starts to read what this process needs of a window, shard by shard from start to end."""
        size = self.spec.batch_size
        steps = range(window.start // size, -(-window.stop // size))
        found = (p for step in steps for p in self.positions(step) if p in window)

        def read() -> None:
            self.source.read_through([self.order[position] for position in found])

        # It is of use only to later reads, and may take as long as it does.
        threading.Thread(target=read, name="read window", daemon=True).start()

    def example(self, position: int, apply: _Apply, budget: int | None = None) -> Features:
        # The generator belongs to the position, not to the record.
        index, rng = self.order[position], self.rngs(position)
        for _ in range(min(_TRIES, len(self.source))):
            try:
                return self._prepare(index, position, rng, apply, budget)
            except ImageError as e:
                self.corrupt.add(self.source.describe(index), e)
                index = self.source.successor(index)
        # No error here, as other processes would wait for this one: all stop by their counts.
        self.corrupt.lose()
        return self.blank


class _RowBatches(_TrainBatches):
    """Batches of the endless training stream in which images share rows, see `data.rows`."""

    def __init__(self, spec: DatasetSpec, *args: Any, seed: int):
        super().__init__(spec, *args, seed=seed)
        # In place of an image that can't be read.
        self.row, self.blank = self.blank, dataclasses.replace(spec, packing=ALONE).blank()
        self.row_rngs = PositionRng(seed, stream=ROWS)

    def positions(self, step: int) -> Iterable[int]:
        images = self.spec.packing.images_per_row
        return (self.first(step) + row * images + i for row in self.rows for i in range(images))

    def make(self, step: int) -> Batch:
        return {k: np.empty((len(self.rows), *v.shape), v.dtype) for k, v in self.row.items()}

    def fill(self, batch: Batch, step: int, start: int, stop: int) -> None:
        for row in range(start, stop):
            number = step * self.spec.rows_per_batch + self.rows[row]
            for name, value in self.fill_row(number).items():
                batch[name][row] = value
        self.corrupt.see((stop - start) * self.spec.packing.images_per_row)

    def fill_row(self, number: int) -> Features:
        """The features of a row of the stream."""
        packing, rng, rest = self.spec.packing, self.row_rngs(number), 0
        row, images = Row(self.row), {}
        for place, share, rate in packing.draw(len(self.row["places"]), rng):
            budget, position = share + rest, number * packing.images_per_row + place
            features = self.example(position, apply, int(budget / (1 - rate)))
            rest = budget - row.add(place, features["image"], budget, rate, rng)
            images[place] = features
        others = self.row.keys() - row.features.keys()
        return row.features | {
            name: np.stack([images[place][name] for place in sorted(images)]) for name in others
        }


class _BudgetBatches:
    """Batches of the endless training stream whose budgets of patches differ.

    Each round takes all budgets once, in an order that is drawn for it, so the position of the
    first example of any step is arithmetic.
    """

    def __init__(self, spec: DatasetSpec, *args: Any, seed: int):
        self.batches = [_OneBudget(one, *args, seed=seed) for one in spec.variants()]
        self.sizes = [one.batch_size for one in spec.variants()]
        self.rngs = PositionRng(seed, stream=BUDGETS)
        for batches in self.batches:
            batches.owner = self

    def turn(self, step: int) -> tuple[int, int]:
        """Which of the budgets a step has, and the position of its first example."""
        around, place = divmod(step, len(self.sizes))
        order = self.rngs(around).permutation(len(self.sizes))
        before = sum(self.sizes[i] for i in order[:place])
        return int(order[place]), around * sum(self.sizes) + before

    def load(self, steps: Iterable[int]) -> Loader[Batch]:
        """The batches of steps, in order."""

        def of(step: int) -> _TrainBatches:
            return self.batches[self.turn(step)[0]]

        def announce(step: int) -> None:
            of(step).announce(step)

        return Loader(
            steps,
            make=lambda step: of(step).make(step),
            fill=lambda batch, step, start, stop: of(step).fill(batch, step, start, stop),
            rows=lambda step: len(of(step).rows),
            num_threads=count_threads(self.batches[0].spec.num_threads),
            ahead=min(batches.ahead for batches in self.batches),
            announce=announce if self.batches[0].source.reads_ahead else None,
        )


class _OneBudget(_TrainBatches):
    """The batches of a `_BudgetBatches` that have one of its budgets."""

    owner: _BudgetBatches

    def first(self, step: int) -> int:
        return self.owner.turn(step)[1]


class _EvalBatches(_Batches):
    """Batches of each record in order; the mask of a record that is missing or unreadable is 0."""

    def __init__(self, *args: Any, seed: int):
        super().__init__(*args, seed=seed)
        self.blank |= {"mask": np.float32(0)}

    def index(self, position: int) -> int | None:
        return position if position < len(self.source) else None

    def example(self, position: int, apply: _Apply) -> Features:
        if position < len(self.source):
            try:
                features = self._prepare(position, position, self.rngs(position), apply)
                return features | {"mask": np.float32(1)}
            except ImageError as e:
                self.corrupt.add(self.source.describe(position), e)
        return self.blank


def train_batches(
    spec: DatasetSpec,
    *,
    seed: int,
    step: int,
    shards: tuple[int, ...] = (0,),
    num_shards: int = 1,
    corrupt: CorruptCounter | None = None,
) -> Loader[Batch]:
    """Endless batches from `step` on: `{"image": uint8 [b, h, w, c], "label": int32 [b]}`.

    Labels are float32 `[b, num_classes]` if an example may have several, and absent if the data has
    none. With classes of pixels, `label_map` is uint8 `[b, h, w]`, with depths float32. With a
    tokenizer, `tokens` int32 `[b, length]` are those of a caption of each image, drawn by seed and
    position if there are several; in evaluation it is the first. Where images share rows, `image`,
    `places` and `grids` are those of `data.rows.Row`, and all others `[rows, images, ...]`. Threads
    load ahead until the iterator is closed or dropped.

    Args:
      spec: what to read; the split is reshuffled in each epoch.
      seed: of order and augmentation.
      step: the first batch to yield.
      shards: which of `num_shards` equal blocks of each batch to yield, concatenated; b is
        `len(shards) * batch_size / num_shards`.
      num_shards: number of blocks.
      corrupt: counts records that can't be read. The next record that can be read replaces one; if
        there is none near by, the image is blank.
    """
    make = _BudgetBatches if spec.budgets else _find_kind(spec)
    batches = make(spec, shards, num_shards, corrupt, seed=seed)
    return batches.load(itertools.count(step))


def _find_kind(spec: DatasetSpec) -> type[_TrainBatches]:
    return _RowBatches if spec.packing.images_per_row > 1 else _TrainBatches


def read_step(spec: DatasetSpec, *, seed: int, step: int) -> tuple[Batch, list[str]]:
    """The global batch after `step` updates, and the path or position of each example's record."""
    spec = dataclasses.replace(spec, num_threads=0)
    batches, positions = _batch_of(spec, seed=seed, step=step)
    records = [batches.source.describe(batches.order[position]) for position in positions]
    return next(batches.load([step])), records


def _batch_of(spec: DatasetSpec, *, seed: int, step: int) -> tuple[_TrainBatches, range]:
    """What fills the global batch after `step` updates, and the positions of its examples."""
    if spec.budgets:
        every = _BudgetBatches(spec, (0,), 1, None, seed=seed)
        batches = every.batches[every.turn(step)[0]]
    else:
        batches = _find_kind(spec)(spec, (0,), 1, None, seed=seed)
    first = batches.first(step)
    return batches, range(first, first + batches.spec.batch_size)


def read_examples(spec: DatasetSpec, *, seed: int, step: int) -> list[Features]:
    """The examples of the global batch after `step` updates, each with its features.

    Where captions are tokenized, `caption` is the one whose `tokens` the batch has.
    """
    batches, positions = _batch_of(spec, seed=seed, step=step)
    return [batches.example(position, apply) for position in positions]


def train_order(spec: DatasetSpec, source: Source, *, seed: int) -> Order:
    """The index in `source` at each position of the endless training stream."""
    if isinstance(source, Mixture):
        order = Mixed(source, spec.schedule(), seed=seed, window=spec.shuffle_window)
    else:
        order = shuffled(source, seed=seed, window=spec.shuffle_window)
    return RepeatedAugmentation(order, spec.batch_size, spec.repeats) if spec.repeats > 1 else order


def eval_batches(
    spec: DatasetSpec,
    *,
    shards: tuple[int, ...] = (0,),
    num_shards: int = 1,
    corrupt: CorruptCounter | None = None,
) -> Loader[Batch]:
    """Every example once, in order: the features of `train_batches`, and `mask`, float32 `[b]`.

    Blank examples with mask 0 pad the last batch, so that all batches have one shape and all hosts
    the same number of batches. They also replace records that can't be read.
    """
    batches = _EvalBatches(spec, shards, num_shards, corrupt, seed=0)
    return batches.load(range(-(-len(batches.source) // spec.batch_size)))


# Batches outside of the loader: the one in training, and one in transfer to the devices.
_HELD = 2


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Memory for the batches of a process.

    Attributes:
      ahead: the number of batches that are filled at a time.
      nbytes: bytes of these and of the batches that are in use.
    """

    ahead: int
    nbytes: int


def plan_buffers(spec: DatasetSpec, *, num_shards: int = 1, shards: int = 1) -> Buffers:
    """Memory for loading ahead: enough to keep all threads busy, or what `max_ram_gb` allows.

    A batch has `num_shards` blocks, of which this process loads `shards`. Raises `UserError` if
    `max_ram_gb` is not enough for one batch ahead.
    """
    if spec.budgets:
        sizes = {"num_shards": num_shards, "shards": shards}
        plans = [plan_buffers(variant, **sizes) for variant in spec.variants()]
        return max(plans, key=lambda plan: plan.nbytes)
    rows = spec.rows_per_batch // num_shards * shards
    shapes = (spec.image_shape(), *spec.view_shapes().values())
    batch = rows * sum(map(math.prod, shapes))
    if spec.features is not None:
        batch = rows * 4 * spec.features.width
    if (unlabelled := spec.info.unlabelled) is not None:
        batch += rows * unlabelled.nbytes * math.prod(spec.label_size or shapes[0][:2])
    ahead = count_ahead(rows, count_threads(spec.num_threads))
    if spec.max_ram_gb is not None:
        least = (1 + _HELD) * batch / 1e9
        if spec.max_ram_gb < least:
            raise UserError(
                f"data.max_ram_gb={spec.max_ram_gb}: {1 + _HELD} batches of {describe_size(batch)} "
                f"on each host are the least: expected {least:.2g} or more, or a smaller "
                f"{spec.key}.batch_size"
            )
        ahead = min(ahead, int(spec.max_ram_gb * 1e9 / batch) - _HELD)
    return Buffers(ahead, (ahead + _HELD) * batch)
