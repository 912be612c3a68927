# SPDX-License-Identifier: Apache-2.0
"""Batches as arithmetic of position.

The example at position p of the endless training stream, and every random choice made for it, are
functions of (seed, p). Step s takes positions s*B to (s+1)*B, and each host some blocks of those:
the batches are the same for any number of hosts, and to resume is to start at another step.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from vit_jax.data import preprocess
from vit_jax.data.image_ops import Decode, Features
from vit_jax.data.sources import DatasetInfo, Source, dataset_info, open_source, placeholder
from vit_jax.utils.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """One split of a dataset and how its examples are prepared.

    Attributes:
      name: of a TFDS dataset.
      split: TFDS split with slices, such as `train[:98%]`.
      preprocess: see `vit_jax.data.preprocess`.
      batch_size: of the whole job, all hosts together.
      data_dir: where TFDS keeps its datasets; None for its default.
      key: the config section, for errors.
      num_threads: that decode and crop; None for one a core, but one.
    """

    name: str
    split: str
    preprocess: str
    batch_size: int
    data_dir: str | None
    key: str
    num_threads: int | None = None

    @property
    def info(self) -> DatasetInfo:
        return dataset_info(self.name, data_dir=self.data_dir)

    def ops(self) -> tuple:
        return preprocess.parse_preprocess(self.preprocess, key=f"{self.key}.preprocess")

    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of preprocessed images, found without reading any.

        Raises:
          UserError: the preprocessing does not decode, or leaves images of different shapes.
        """
        ops = self.ops()
        if [isinstance(op, Decode) for op in ops] != [True] + [False] * (len(ops) - 1):
            raise UserError(
                f"{self.key}.preprocess={self.preprocess!r}: expected 'decode' first, and once"
            )
        shapes = set()
        for fill in ((64, 96), (600, 400)):
            features = {"image": placeholder(self.info.image_shape, fill), "label": np.int32(0)}
            image = preprocess.apply(ops, features, np.random.default_rng(0))["image"]
            shapes.add(image.shape)
        if len(shapes) > 1:
            raise UserError(
                f"{self.key}.preprocess={self.preprocess!r} leaves images of {self.name} in "
                "different sizes: add resize(SIZE) or a crop"
            )
        return shapes.pop()

    def open(self) -> Source:
        return open_source(self.name, self.split, data_dir=self.data_dir, key=f"{self.key}.split")


class _Preprocess(grain.transforms.RandomMap):
    def __init__(self, spec: DatasetSpec):
        self._ops = spec.ops()

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        return preprocess.apply(self._ops, element, rng)


def train_batches(
    spec: DatasetSpec, *, seed: int, step: int, shards: tuple[int, ...] = (0,), num_shards: int = 1
) -> Iterator[Batch]:
    """Endless batches from `step` on: `{"image": uint8 [b, h, w, c], "label": int32 [b]}`.

    Args:
      spec: what to read; the split is shuffled anew in each epoch.
      seed: of order and augmentation.
      step: the first batch to yield.
      shards: which of `num_shards` equal blocks of each batch to yield, one after the other; b is
        batch_size / num_shards for each.
      num_shards: number of blocks.
    """
    examples = grain.MapDataset.source(spec.open()).seed(seed).shuffle().repeat()
    # After `repeat`: a generator of its own for each position, not for each record.
    examples = examples.random_map(_Preprocess(spec))
    return _load(examples, spec, step=step, steps=None, shards=shards, num_shards=num_shards)


def eval_batches(
    spec: DatasetSpec, *, shards: tuple[int, ...] = (0,), num_shards: int = 1
) -> Iterator[Batch]:
    """Every example once, in order, as `image`, `label` and `mask` (float32 [b]).

    The last batch is filled up with examples of mask 0, so that all batches have one shape and all
    hosts the same number of them.
    """
    source = _Padded(spec.open(), spec.batch_size)
    examples = grain.MapDataset.source(source).seed(0).random_map(_Preprocess(spec))
    steps = len(source) // spec.batch_size
    return _load(examples, spec, step=0, steps=steps, shards=shards, num_shards=num_shards)


class _Padded:
    """A source with a mask, filled up to a multiple of the batch size."""

    def __init__(self, source: Source, batch_size: int):
        self._source = source
        self._length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Features:
        real = index < len(self._source)
        return self._source[index if real else 0] | {"mask": np.float32(real)}


# Examples that one thread prepares at a time: enough to share its overhead, few enough that what
# is prepared ahead stays small beside a batch.
_CHUNK = 64


def _load(
    examples: grain.MapDataset,
    spec: DatasetSpec,
    *,
    step: int,
    steps: int | None,
    shards: tuple[int, ...],
    num_shards: int,
) -> Iterator[Batch]:
    block = spec.batch_size // num_shards
    size = max(n for n in range(1, min(block, _CHUNK) + 1) if block % n == 0)
    per_block = block // size
    mine = [shard * per_block + i for shard in shards for i in range(per_block)]
    chunks = _Chunks(
        examples.batch(size, drop_remainder=True), mine, num_shards * per_block, step, steps
    )
    threads = spec.num_threads or max(1, _usable_cores() - 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads + len(mine))
    loaded = grain.MapDataset.source(chunks).to_iter_dataset(options)
    return iter(loaded.batch(len(mine), drop_remainder=True, batch_fn=_concatenate))


class _Chunks:
    """The chunks of each step that are this host's, in order."""

    def __init__(
        self, chunks: grain.MapDataset, mine: list[int], per_step: int, step: int, steps: int | None
    ):
        self._chunks, self._mine, self._per_step, self._step = chunks, mine, per_step, step
        endless = sys.maxsize // (2 * per_step) - step
        self._length = (endless if steps is None else steps) * len(mine)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        step, i = divmod(index, len(self._mine))
        chunk = self._chunks[(self._step + step) * self._per_step + self._mine[i]]
        assert chunk is not None  # nothing here filters
        return chunk


def _concatenate(chunks: Sequence[Batch]) -> Batch:
    if len(chunks) == 1:
        return chunks[0]
    return {k: np.concatenate([chunk[k] for chunk in chunks]) for k in chunks[0]}


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
