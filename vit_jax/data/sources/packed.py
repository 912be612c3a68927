# SPDX-License-Identifier: Apache-2.0
"""Datasets written by `vit_jax.data.pack`: smaller JPEGs in few files, or pixels in one per split.

`DST/pack.json` is the manifest. Each shard has `SPLIT-00000-of-00010.npz` with the labels, which is
written after its images, and either an `.array_record` file of JPEGs or its part of `SPLIT.pixels`,
uint8 `[rows, size, size, 3]`. An image that could not be read leaves an empty place, so that
positions are those of the source.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.base import Dataset, DatasetInfo, Records
from vit_jax.utils.errors import UserError

MANIFEST = "pack.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `pack.json`.

    Attributes:
      source: name of the dataset that was packed.
      splits: lengths of its splits.
      num_classes: labels are from 0 to `num_classes` - 1.
      multi_label: whether an example may have several labels.
      class_names: names by label, if they are known.
      short_side: limit of the shorter side of the JPEGs; None for pixels.
      quality: of the JPEGs; None for pixels.
      raw: height and width of the pixels; None for JPEGs.
      shard_size: examples of each file except the last of a split.
    """

    source: str
    splits: dict[str, int]
    num_classes: int
    multi_label: bool
    class_names: tuple[str, ...] | None
    short_side: int | None
    quality: int | None
    raw: int | None
    shard_size: int

    @property
    def kind(self) -> str:
        """The prefix of the dataset's name in a config."""
        return "packed" if self.raw is None else "raw"

    def shards(self) -> list["Shard"]:
        """All shards, split by split."""
        return [
            Shard(
                f"{split}-{number:05}-of-{-(-length // self.shard_size):05}",
                split,
                start,
                min(start + self.shard_size, length),
            )
            for split, length in self.splits.items()
            for number, start in enumerate(range(0, length, self.shard_size))
        ]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Examples `start` to `stop` of a split, in files of this name."""

    name: str
    split: str
    start: int
    stop: int


def read_manifest(folder: Path, *, key: str) -> Manifest:
    """Reads `pack.json`; raises `UserError` if it is missing or invalid."""
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = values.pop("class_names")
        return Manifest(**values, class_names=None if names is None else tuple(names))
    except OSError as e:
        raise UserError(
            f"{key}: {folder / MANIFEST}: {e.strerror}; expected a folder that "
            "python -m vit_jax.data.pack wrote"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{key}: {folder / MANIFEST} can't be read: {e}") from None


class Jpegs(Records):
    """JPEGs of the shards, concatenated."""

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self._paths = [str(folder / f"{shard.name}.array_record") for shard in shards]
        self._source = ArrayRecordDataSource(self._paths)

    def read(self, row: int) -> bytes:
        encoded = self._source[row]
        if not encoded:
            raise ImageError("it could not be read when it was packed")
        return encoded

    def describe(self, row: int) -> str:
        return f"{os.path.dirname(self._paths[0])}[{row}]"


class Pixels(Records):
    """Pixels of all splits, in memory-mapped files."""

    def __init__(self, folder: Path, manifest: Manifest, good: np.ndarray):
        self._folder, self._good = folder, good
        size = manifest.raw or 0
        # Plain arrays are faster to index than memmaps.
        self._splits = [
            np.asarray(
                np.memmap(folder / f"{split}.pixels", np.uint8, "r", 0, (length, size, size, 3))
            )
            for split, length in manifest.splits.items()
        ]
        self._starts = (0, *itertools.accumulate(map(len, self._splits)))

    def read(self, row: int) -> np.ndarray:
        if not self._good[row]:
            raise ImageError("it could not be read when it was packed")
        for split, start in zip(self._splits, self._starts, strict=False):
            if row < start + len(split):
                return split[row - start]
        raise IndexError(row)

    def describe(self, row: int) -> str:
        return f"{self._folder}[{row}]"


@functools.cache
def _dataset(path: str, kind: str) -> Dataset:
    """Opens a packed dataset; splits, rows and labels are those of its source.

    Raises `UserError` if it is missing, unfinished, or of the other kind.
    """
    name = f"{kind}:{path}"
    key = f"data.name={name!r}"
    folder = Path(path).expanduser().absolute()
    manifest = read_manifest(folder, key=key)
    if manifest.kind != kind:
        raise UserError(f"{key}: expected {manifest.kind}:{path}, by what is in it")
    shards = manifest.shards()
    missing = [shard.name for shard in shards if not (folder / f"{shard.name}.npz").exists()]
    if missing:
        raise UserError(
            f"{key}: {len(missing)} of {len(shards)} shards are missing, such as {missing[0]}: run "
            "the same python -m vit_jax.data.pack again"
        )
    parts = [np.load(folder / f"{shard.name}.npz") for shard in shards]
    values, counts, good = (
        np.concatenate([part[k] for part in parts]) for k in ("labels", "counts", "good")
    )
    labels = np.split(values, np.cumsum(counts)[:-1]) if manifest.multi_label else values
    size = manifest.raw
    info = DatasetInfo(
        manifest.num_classes, (size, size, 3), manifest.class_names, manifest.multi_label
    )
    starts = itertools.accumulate(manifest.splits.values(), initial=0)
    splits = {
        split: np.arange(start, start + length)
        for start, (split, length) in zip(starts, manifest.splits.items(), strict=False)
    }
    records = Jpegs(folder, shards) if size is None else Pixels(folder, manifest, good)
    return Dataset(name, info, records, labels, splits)


packed_dataset = functools.partial(_dataset, kind="packed")
raw_dataset = functools.partial(_dataset, kind="raw")
