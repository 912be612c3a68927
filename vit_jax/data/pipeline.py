# SPDX-License-Identifier: Apache-2.0
"""Batches as arithmetic of position.

The example at position p of the endless training stream, and every random choice made for it, are
functions of (seed, p). Step s takes positions s*B to (s+1)*B, and each host some blocks of those:
the batches are the same for any number of hosts, and to resume is to start at another step.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterable

import numpy as np

from vit_jax.data import loader, preprocess
from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.fused import Target, fuse
from vit_jax.data.mixture import Mixture, Schedule, make_schedule, merge_infos
from vit_jax.data.ops.decode import ImageError
from vit_jax.data.ops.transforms import Decode, Features
from vit_jax.data.order import Mixed, Order, PositionRng, RepeatedAugmentation, shuffled
from vit_jax.data.sources import dataset_info, open_source, placeholder
from vit_jax.data.sources.base import DatasetInfo, Source
from vit_jax.utils.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """One split of a dataset, or a mixture of several, and how its examples are prepared.

    Attributes:
      name: of a TFDS dataset, or `folder:PATH`, `manifest:PATH`, `parquet:PATH`.
      split: with slices, such as `train[:98%]`.
      preprocess: see `vit_jax.data.preprocess`.
      batch_size: of the whole job, all hosts together.
      data_dir: where TFDS keeps its datasets; None for its default.
      key: the config section, for errors.
      num_threads: that decode and crop; 0 for none beside the caller, None for one a core.
      mixture: (name, split, weight) of each source to mix, in place of `name` and `split`.
      split_key: of the split in the config section, for errors.
      repeats: how often each image stands in a batch of training, each time augmented anew.
      max_ram_gb: limit of `plan_buffers`, in 10**9 bytes.
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
    max_ram_gb: float | None = None

    @property
    def info(self) -> DatasetInfo:
        names = [name for name, *_ in self.mixture] or [self.name]
        infos = [dataset_info(name, data_dir=self.data_dir) for name in names]
        return merge_infos(infos, names, key=f"{self.key}.mixture")

    def ops(self) -> tuple:
        return preprocess.parse_preprocess(self.preprocess, key=f"{self.key}.preprocess")

    def label_shape(self) -> tuple[int, ...]:
        """`()`, or `(classes,)` if an example may have several labels."""
        return (self.info.num_classes,) if self.info.multi_label else ()

    def blank(self) -> Features:
        """A prepared example of zeros."""
        dtype = np.float32 if self.info.multi_label else np.int32
        return {
            "image": np.zeros(self.image_shape(), np.uint8),
            "label": np.zeros(self.label_shape(), dtype)[()],
        }

    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of preprocessed images, found without reading any.

        Raises:
          UserError: the preprocessing does not decode, or leaves images of different shapes.
        """
        shapes = find_shapes(self.preprocess, self.info.image_shape, key=f"{self.key}.preprocess")
        if len(shapes) > 1:
            raise UserError(
                f"{self.key}.preprocess={self.preprocess!r} leaves images of {self} in "
                "different sizes: add resize(SIZE) or a crop"
            )
        return shapes.pop()

    def open(self) -> Source:
        """The records; of a mixture those of all its sources, one after the other."""
        if not self.mixture:
            return self._open(self.name, self.split, self.split_key)
        return Mixture([self._open(name, split, "mixture") for name, split, _ in self.mixture])

    def _open(self, name: str, split: str, key: str) -> Source:
        return open_source(name, split, data_dir=self.data_dir, key=f"{self.key}.{key}")

    def schedule(self) -> Schedule:
        """Which source of the mixture each position takes."""
        weights = tuple(weight for *_, weight in self.mixture)
        return make_schedule(weights, key=f"{self.key}.mixture")

    def __str__(self) -> str:
        return ", ".join(name for name, *_ in self.mixture) or self.name


def find_shapes(
    line: str, image_shape: tuple[int | None, ...], *, key: str
) -> set[tuple[int, int, int]]:
    """Height, width and channels of what a preprocessing line makes of blank images.

    Args:
      line: see `vit_jax.data.preprocess`.
      image_shape: of the images, None where they vary.
      key: of the line, for errors.

    Raises:
      UserError: it does not decode first, and once.
    """
    ops = preprocess.parse_preprocess(line, key=key)
    if [isinstance(op, Decode) for op in ops] != [True] + [False] * (len(ops) - 1):
        raise UserError(f"{key}={line!r}: expected 'decode' first, and once")
    shapes = set()
    for fill in ((64, 96), (600, 400)):
        features = {"image": placeholder(image_shape, fill), "label": np.int32(0)}
        shapes.add(preprocess.apply(ops, features, np.random.default_rng(0))["image"].shape)
    return shapes


# Records that are tried in place of one that can't be read: beyond that the storage is at fault.
_TRIES = 100


class _TrainExamples:
    """The prepared example of each position of an order."""

    def __init__(
        self,
        spec: DatasetSpec,
        source: Source,
        target: Target,
        corrupt: CorruptCounter,
        *,
        seed: int,
    ):
        self._source, self._corrupt = source, corrupt
        self._order, self._draws = train_order(spec, source, seed=seed), PositionRng(seed)
        self._ops = fuse(spec.ops(), target=target)
        self._blank = spec.blank()

    def __call__(self, position: int) -> Features:
        # A generator of its own for each position, not for each record.
        index, rng = self._order[position], self._draws(position)
        # The next record that can be read stands in for one that can't.
        for _ in range(min(_TRIES, len(self._source))):
            try:
                return preprocess.apply(self._ops, self._source[index], rng)
            except ImageError as e:
                self._corrupt.add(self._source.describe(index), e)
                index = self._source.successor(index)
        # No error here, which other processes would wait for: all stop by the counts.
        self._corrupt.lose()
        return self._blank


class _EvalExamples:
    """Each record in order; one that can't be read, or is not there, has the mask 0."""

    def __init__(self, spec: DatasetSpec, source: Source, target: Target, corrupt: CorruptCounter):
        self._source, self._corrupt, self._draws = source, corrupt, PositionRng(0)
        self._ops = fuse(spec.ops(), target=target)
        self._blank = spec.blank()

    def __call__(self, position: int) -> Features:
        if position < len(self._source):
            try:
                rng = self._draws(position)
                features = preprocess.apply(self._ops, self._source[position], rng)
                return features | {"mask": np.float32(1)}
            except ImageError as e:
                self._corrupt.add(self._source.describe(position), e)
        return self._blank | {"mask": np.float32(0)}


def train_batches(
    spec: DatasetSpec,
    *,
    seed: int,
    step: int,
    shards: tuple[int, ...] = (0,),
    num_shards: int = 1,
    corrupt: CorruptCounter | None = None,
) -> Generator[Batch]:
    """Endless batches from `step` on: `{"image": uint8 [b, h, w, c], "label": int32 [b]}`.

    Labels are float32 `[b, classes]` where an example may have several.

    Args:
      spec: what to read; the split is shuffled anew in each epoch.
      seed: of order and augmentation.
      step: the first batch to yield.
      shards: which of `num_shards` equal blocks of each batch to yield, one after the other; b is
        batch_size / num_shards for each.
      num_shards: number of blocks.
      corrupt: counts records that can't be read, in whose place the next ones stand; blank images
        if those can't be read either.

    Threads load ahead until the iterator is closed or dropped.
    """
    corrupt, target = corrupt or CorruptCounter(), Target()
    examples = _TrainExamples(spec, spec.open(), target, corrupt, seed=seed)
    return _load(examples, target, spec, itertools.count(step), shards, num_shards, corrupt)


def read_step(spec: DatasetSpec, *, seed: int, step: int) -> tuple[Batch, list[str]]:
    """The whole batch of the step after `step` updates, and where each example comes from."""
    source = spec.open()
    order = train_order(spec, source, seed=seed)
    first = step * spec.batch_size
    records = [source.describe(order[first + i]) for i in range(spec.batch_size)]
    # In this thread, and no more than the one.
    batches = train_batches(dataclasses.replace(spec, num_threads=0), seed=seed, step=step)
    return next(batches), records


def train_order(spec: DatasetSpec, source: Source, *, seed: int) -> Order:
    """The index in `source` at each position of the endless training stream."""
    if isinstance(source, Mixture):
        order = Mixed(source, spec.schedule(), seed=seed)
    else:
        order = shuffled(len(source), seed=seed)
    return RepeatedAugmentation(order, spec.batch_size, spec.repeats) if spec.repeats > 1 else order


def eval_batches(
    spec: DatasetSpec,
    *,
    shards: tuple[int, ...] = (0,),
    num_shards: int = 1,
    corrupt: CorruptCounter | None = None,
) -> Generator[Batch]:
    """Every example once, in order, as `image`, `label` and `mask` (float32 [b]).

    The last batch is filled up with examples of mask 0, so that all batches have one shape and all
    hosts the same number of them. Records that can't be read have the mask 0 too.
    """
    source = spec.open()
    steps = range(-(-len(source) // spec.batch_size))
    corrupt, target = corrupt or CorruptCounter(), Target()
    examples = _EvalExamples(spec, source, target, corrupt)
    return _load(examples, target, spec, steps, shards, num_shards, corrupt)


# Bytes of encoded images that a thread holds, so as to decode them at one go.
_MAX_WAITING = 1 << 24

# Batches outside of the loader: the one that is trained on, and one on its way to the devices.
_HELD = 2


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Memory for the batches of a process.

    Attributes:
      ahead: batches that are filled at a time.
      nbytes: of these, and of those that were handed out and are still in use.
    """

    ahead: int
    nbytes: int


def plan_buffers(spec: DatasetSpec, *, num_shards: int = 1, shards: int = 1) -> Buffers:
    """How many batches are loaded ahead: enough for all threads, or what `max_ram_gb` allows.

    Args:
      spec: of the data.
      num_shards: blocks that a batch is cut into.
      shards: how many of them this process loads.

    Raises:
      UserError: `max_ram_gb` is not enough for one batch ahead.
    """
    rows = spec.batch_size // num_shards * shards
    batch = rows * math.prod(spec.image_shape())
    ahead = loader.count_ahead(rows, loader.count_threads(spec.num_threads))
    if spec.max_ram_gb is not None:
        least = (1 + _HELD) * batch / 1e9
        if spec.max_ram_gb < least:
            raise UserError(
                f"data.max_ram_gb={spec.max_ram_gb}: {1 + _HELD} batches of {batch / 1e6:,.1f} MB "
                f"on each host are the least: expected {least:.2g} or more, or a smaller "
                f"{spec.key}.batch_size"
            )
        ahead = min(ahead, int(spec.max_ram_gb * 1e9 / batch) - _HELD)
    return Buffers(ahead, (ahead + _HELD) * batch)


@dataclasses.dataclass
class _Buffer:
    """A batch in the making: images `[b, h, w, c]` and the other features of each row."""

    images: np.ndarray
    rest: list[Features]

    def batch(self) -> Batch:
        rest = {k: np.stack([features[k] for features in self.rest]) for k in self.rest[0]}
        return {"image": self.images} | rest


def _load(
    examples: Callable[[int], Features],
    target: Target,
    spec: DatasetSpec,
    steps: Iterable[int],
    shards: tuple[int, ...],
    num_shards: int,
    corrupt: CorruptCounter,
) -> Generator[Batch]:
    block = spec.batch_size // num_shards
    rows = [shard * block + i for shard in shards for i in range(block)]
    shape = spec.image_shape()

    def make(step: int) -> _Buffer:
        return _Buffer(np.empty((len(rows), *shape), np.uint8), [{}] * len(rows))

    def prepare(buffer: _Buffer, step: int, i: int) -> None:
        target.row = buffer.images[i]
        features = examples(step * spec.batch_size + rows[i])
        image = features["image"]
        if image.shape != shape or image.dtype != np.uint8:
            raise UserError(
                f"{spec.key}.preprocess={spec.preprocess!r} made an image of {image.dtype} "
                f"{image.shape}; expected uint8 {shape}"
            )
        if image is not target.row:
            buffer.images[i] = image
        buffer.rest[i] = {k: v for k, v in features.items() if k != "image"}
        target.row = None  # it would keep the batch alive

    def fill(buffer: _Buffer, step: int, start: int, stop: int) -> None:
        waiting, nbytes, target.jobs = [], 0, []
        for i in range(start, stop):
            prepare(buffer, step, i)
            if len(target.jobs) > len(waiting):
                waiting.append(i)
                nbytes += len(target.jobs[-1][0])
            if nbytes > _MAX_WAITING or i == stop - 1:
                for k, done in zip(waiting, target.run(), strict=True):
                    if not done:
                        prepare(buffer, step, k)  # by the operations themselves
                waiting, nbytes, target.jobs = [], 0, []
        target.jobs = None
        corrupt.see(stop - start)

    buffers = loader.Loader(
        steps,
        make=make,
        fill=fill,
        rows=len(rows),
        num_threads=loader.count_threads(spec.num_threads),
        ahead=plan_buffers(spec, num_shards=num_shards, shards=len(shards)).ahead,
    )
    return (buffer.batch() for buffer in buffers)
