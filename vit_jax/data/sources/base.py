# SPDX-License-Identifier: Apache-2.0
"""Interfaces of sources of examples: facts about a dataset, splits, records."""

import abc
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.compact import Ragged
from vit_jax.utils.class_names import normalize_name
from vit_jax.utils.errors import UserError
from vit_jax.utils.text import printable

# Limit of the number of classes: larger labels are probably ids.
MAX_CLASSES = 2**20

# Characters of a caption; a longer one is probably another kind of file.
MAX_CAPTION = 2**16

# The label of an example whose label is not known, as that of a test set that is kept secret.
NO_LABEL = -1

# The value of pixels that count nowhere: in a map of classes, and in one of depths.
IGNORED = 255
NO_DEPTH = 0.0

# Seed of splits and orders, which must not depend on the seed of a run.
_SEED = 0

# The share of each class in `validation` and in `test`, where data has no splits of its own.
HELD_OUT = 0.1


class NoLabelError(UserError):
    """A split that is opened has an example without a label."""


def refuse_label(label: Any, where: str, num_classes: int) -> NoReturn:
    """Raises `UserError` for a label out of range; it is `NoLabelError` for `NO_LABEL`."""
    has = "has no label" if label == NO_LABEL else f"has label {label}"
    raise (NoLabelError if label == NO_LABEL else UserError)(
        f"{where} {has}; expected integers from 0 to {num_classes - 1}"
    )


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset that are known before its images are read.

    Attributes:
      num_classes: labels are from 0 to `num_classes` - 1; 0 if there are no labels, as images may
        have captions only.
      image_shape: height, width and channels; None where they vary.
      class_names: names by label, if they are known; they are made one line each, and NFC.
      multi_label: whether an example has any number of labels, as a vector of zeros and ones.
      captions: whether images have captions, which `Source.captions` gives.
      pixel_classes: the names of the classes of pixels, if each image has a label map; such data
        has no labels of images. They are made one line each, and NFC.
      pixel_depth: whether the label maps are of depths.
    """

    num_classes: int
    image_shape: tuple[int | None, ...]
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
    captions: bool = False
    pixel_classes: tuple[str, ...] | None = None
    pixel_depth: bool = False

    def __post_init__(self) -> None:
        for field in ("class_names", "pixel_classes"):
            given = getattr(self, field)
            if given is not None:
                # Any source may give names, which are written to files with a name a line.
                names = tuple(printable(normalize_name(str(name))) for name in given)
                object.__setattr__(self, field, names)

    @property
    def unlabelled(self) -> np.generic | None:
        """The value of pixels of a label map that count nowhere; None if there are no such maps."""
        if self.pixel_depth:
            return np.float32(NO_DEPTH)
        return np.uint8(IGNORED) if self.pixel_classes else None


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """The examples of a split by the shards that they are stored in.

    Attributes:
      bounds: shard k has the examples `bounds[k]` to `bounds[k + 1]` by place, int64
        `[shards + 1]`; none is empty.
      order: the index of the example at each place, integers `[examples]`; None if that is the
        place itself.
    """

    bounds: np.ndarray
    order: np.ndarray | None


class Source(abc.ABC):
    """Records of one split by position: `{"image": ..., "label": ...}`.

    The image is encoded bytes, or read-only pixels, uint8 `[height, width, 3]`. The label is an
    int32, or float32 `[num_classes]` if an example may have several; data without labels has none.
    A source that reads captions with the image has them as `text` too, as `captions` gives them.
    With `DatasetInfo.pixel_classes`, `label_map` has the class of each pixel, uint8
    `[height, width]`, or `IGNORED`; with `pixel_depth`, it has the depth of each pixel in metres,
    float32 `[height, width]`, or `NO_DEPTH`.
    """

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads a record; raises `ImageError` if its image can't be read."""

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """The origin of a record: a path, or a dataset and a position."""

    @property
    def reads_ahead(self) -> bool:
        """Whether `ahead` does something."""
        return False

    def ahead(self, indices: Sequence[int], *, captions: bool) -> None:  # noqa: B027
        """Starts to read records, with their captions or without, that will be asked for soon."""

    def shards(self) -> Shards | None:
        """The shards that the records are stored in; None if that is not known."""
        return None

    def read_through(self, indices: Sequence[int]) -> None:  # noqa: B027
        """Reads records in the order of their places, so that the system has them in memory."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image in their order, without those that are empty.

        Raises `ImageError` if they can't be read, or if one has more than `MAX_CAPTION` characters.
        """
        return self[index].get("text", ())

    def file_name(self, index: int) -> str:
        """The file name of an image, or else the end of `describe`."""
        return os.path.basename(self.describe(index))

    def successor(self, index: int) -> int:
        """The position of the record that replaces this one if it can't be read."""
        return (index + 1) % len(self)


class Records(abc.ABC):
    """All encoded images of a dataset, in a fixed order. Reading is safe from many threads."""

    @abc.abstractmethod
    def read(self, row: int) -> bytes | np.ndarray:
        """The encoded image, or pixels, uint8 `[height, width, 3]`; may raise `ImageError`."""

    @abc.abstractmethod
    def describe(self, row: int) -> str:
        """The origin of an image."""

    @property
    def reads_ahead(self) -> bool:
        """Whether `ahead` does something, as where each read takes long."""
        return False

    def ahead(self, rows: Sequence[int], *, captions: bool) -> None:  # noqa: B027
        """Starts to read images, with their captions or without; each will be read once."""

    def shard_bounds(self) -> np.ndarray | None:
        """The row of the first image of each shard, and the number of rows, int64 `[shards + 1]`.

        It is None where rows are not in the order of their places in shards.
        """
        return None

    def read_through(self, rows: Sequence[int]) -> None:  # noqa: B027
        """Reads sorted rows in the order of their places, so that the system has them in memory."""


class Captions(Protocol):
    """The captions of each row of a dataset. Reading is safe from many threads."""

    def __getitem__(self, row: int, /) -> Sequence[str]:
        """The captions of a row; raises `ImageError` if they can't be read."""
        ...


class LabelMaps(Protocol):
    """The label map of each row of a dataset. Reading is safe from many threads."""

    def __getitem__(self, row: int, /) -> np.ndarray:
        """The class of each pixel, uint8 `[height, width]`; raises `ImageError`."""
        ...


def tidy_captions(captions: Sequence[str]) -> tuple[str, ...]:
    """Returns captions without white space around them, and without those that are empty.

    Raises `ImageError` if one has more than `MAX_CAPTION` characters.
    """
    for caption in captions:
        if len(caption) > MAX_CAPTION:
            raise ImageError(
                f"a caption has {len(caption):,} characters; expected at most {MAX_CAPTION:,}"
            )
    stripped = (caption.strip() for caption in captions)
    return tuple(caption for caption in stripped if caption)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images with labels or captions, divided into splits.

    Attributes:
      name: in the config, such as `folder:/data/birds`.
      info: classes and shape.
      records: the images.
      labels: int32 `[rows]`, or an int32 array for each row if there may be several labels. Splits
        that are never opened may have other labels than 0 to `num_classes` - 1, such as `NO_LABEL`.
        They mean nothing if there are no classes.
      splits: the rows of each split, in order, as integers `[examples]`.
      cut: whether the splits are those of `make_splits`, as the data has none of its own.
      captions: of each row, where `info.captions`.
      label_maps: of each row, where `info.pixel_classes` or `info.pixel_depth`.

    Raises:
      UserError: there is another number of class names than of classes, or captions or label maps
        are missing.
    """

    name: str
    info: DatasetInfo
    records: Records
    labels: np.ndarray | Sequence[np.ndarray]
    splits: Mapping[str, np.ndarray]
    cut: bool = False
    captions: Captions | None = None
    label_maps: LabelMaps | None = None

    def __post_init__(self) -> None:
        names, count = self.info.class_names, self.info.num_classes
        if names is not None and len(names) != count:
            raise UserError(
                f"data.name={self.name!r} has {len(names):,} class names for {count:,} classes; "
                "expected as many"
            )
        if self.info.captions and self.captions is None:
            raise UserError(
                f"data.name={self.name!r} has captions=True in its info: expected its captions too"
            )
        of_pixels = (self.info.pixel_classes is not None) + self.info.pixel_depth
        if of_pixels != (self.label_maps is not None):
            raise UserError(
                f"data.name={self.name!r}: expected pixel_classes or pixel_depth in its info "
                "together with label_maps, or none of them"
            )

    @property
    def lengths(self) -> dict[str, int]:
        """The number of examples of each split."""
        return {split: len(rows) for split, rows in self.splits.items()}

    @property
    def in_shards(self) -> bool:
        """Whether `Source.shards` of the splits are known."""
        return self.records.shard_bounds() is not None

    def open(self, split: str, *, key: str) -> "Rows":
        """The examples of a split with slices, such as `train[:98%]`.

        Raises `UserError` if there is no such split, see `select`, or if a label in it is missing,
        out of range, or no integer.
        """
        parts = select(split, self.lengths, name=self.name, key=key)
        rows = np.concatenate([self.splits[n][start:stop] for n, start, stop in parts])
        if self.info.num_classes:
            self._check_labels(rows, where=f"{key}={split!r} of {self.name}")
        return Rows(self, rows)

    def _check_labels(self, rows: np.ndarray, where: str) -> None:
        if isinstance(self.labels, np.ndarray):
            labels = self.labels[rows]
        elif isinstance(self.labels, Ragged):
            labels, counts = self.labels.select(rows)
            rows = np.repeat(rows, counts)
        else:
            of_rows = [np.atleast_1d(self.labels[row]) for row in rows]
            rows = np.repeat(rows, [len(labels) for labels in of_rows])
            labels = np.concatenate(of_rows)
        bad = np.ones(len(labels), bool)
        if labels.dtype.kind in "iuf":
            bad = (labels < 0) | (labels >= self.info.num_classes)
        if labels.dtype.kind == "f":
            bad |= labels != np.floor(labels)
        for place in np.flatnonzero(bad)[:1]:
            record = f"{self.records.describe(int(rows[place]))} (row {rows[place] + 1})"
            own = labels[rows == rows[place]]
            if labels[place] == NO_LABEL and np.any(own != NO_LABEL):
                raise UserError(
                    f"{where}: {record} has a label that is -1 or empty in its list of {len(own)}; "
                    f"expected integers from 0 to {self.info.num_classes - 1}"
                )
            refuse_label(labels[place], f"{where}: {record}", self.info.num_classes)


class Rows(Source):
    """Some rows of a dataset."""

    def __init__(self, dataset: Dataset, rows: np.ndarray):
        self._dataset, self._rows = dataset, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: dict[str, Any] = {"image": self._dataset.records.read(int(self._rows[index]))}
        if self._dataset.info.num_classes:
            record["label"] = self.label(index)
        if self._dataset.label_maps is not None:
            record["label_map"] = self._dataset.label_maps[int(self._rows[index])]
        return record

    @property
    def reads_ahead(self) -> bool:
        return self._dataset.records.reads_ahead

    def ahead(self, indices: Sequence[int], *, captions: bool) -> None:
        self._dataset.records.ahead([int(self._rows[i]) for i in indices], captions=captions)

    def shards(self) -> Shards | None:
        bounds, rows, order = self._dataset.records.shard_bounds(), self._rows, None
        if bounds is None:
            return None
        if np.any(rows[1:] < rows[:-1]):
            order = np.argsort(rows, kind="stable")
            rows = rows[order]
        return Shards(np.unique(np.searchsorted(rows, bounds)), order)

    def read_through(self, indices: Sequence[int]) -> None:
        self._dataset.records.read_through(sorted(int(self._rows[i]) for i in indices))

    def label(self, index: int) -> Any:
        """The label of a record, without reading its image."""
        label = self._dataset.labels[self._rows[index]]
        if not self._dataset.info.multi_label:
            return np.int32(label)
        several = np.zeros(self._dataset.info.num_classes, np.float32)
        several[label] = 1
        return several

    def captions(self, index: int) -> tuple[str, ...]:
        captions = self._dataset.captions
        return () if captions is None else tidy_captions(captions[int(self._rows[index])])

    def describe(self, index: int) -> str:
        return self._dataset.records.describe(int(self._rows[index]))


def select(
    split: str, lengths: Mapping[str, int], *, name: str, key: str
) -> list[tuple[str, int, int]]:
    """Parts (name, start, stop) of a split in TFDS's notation, such as `train[:98%]+test`.

    Raises `UserError` if it can't be parsed, if there is no such split, or if it is empty.
    """
    infos = {
        n: tfds.core.SplitInfo(name=n, shard_lengths=[length], num_bytes=0)
        for n, length in lengths.items()
    }
    has = f"{name} has {', '.join(f'{n} ({length:,})' for n, length in lengths.items())}"
    try:
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, KeyError, AssertionError, NotImplementedError) as e:
        unknown = re.fullmatch(r"[\w-]+", split) and split not in lengths
        reason = "there is no such split" if unknown else " ".join(str(e).split())[:200].rstrip(".")
        raise UserError(f"{key}={split!r}: {reason}; {has}{_advise(key, lengths)}") from None
    parts = []
    for part in instructions:
        stop = lengths[part.splitname] if part.to is None else part.to
        parts.append((part.splitname, part.from_ or 0, stop))
    if not any(start < stop for _, start, stop in parts):
        raise UserError(f"{key}={split!r} holds no examples; {has}{_advise(key, lengths)}")
    return parts


def _advise(key: str, lengths: Mapping[str, int]) -> str:
    """Returns the overrides that would do, for a split of an evaluator that is not there."""
    section, _, last = key.rpartition(".")
    if not section.startswith("evals.") or last != "split":
        return ""
    held = [split for split in ("test", "validation") if lengths.get(split)]
    other = "".join(f"--config.{key}={split}, or " for split in held[:1])
    return f"; add {other}--config.{section}=none to leave it out"


def make_splits(
    labels: np.ndarray | Sequence[np.ndarray],
    split_of_row: Sequence[str] | None,
) -> dict[str, np.ndarray]:
    """Rows of each split, int64 `[examples]`, in a seeded order: any slice is a random sample.

    `labels` are int32 `[rows]` or an array for each row; their order must not depend on the file
    system. Without the split of each row, `train`, `validation` and `test` are 80, 10 and 10
    percent of each class. A class of three images or more has at least one in each of them; one of
    two has none in `validation`, and a single image is in `train`.
    """
    if split_of_row is not None:
        names = sorted(set(split_of_row))
        number_of = {name: number for number, name in enumerate(names)}
        return order_splits(np.array([number_of[name] for name in split_of_row]), names)
    order = np.random.default_rng(_SEED).permutation(len(labels))
    # Sorted by class, then in the seeded order; rows with several labels count as one class.
    classes = labels[order] if isinstance(labels, np.ndarray) else np.zeros(len(order), np.int32)
    by_class = np.argsort(classes, kind="stable")
    _, starts, counts = np.unique(classes[by_class], return_index=True, return_counts=True)
    split, names = np.zeros(len(order), np.uint8), ("train", "validation", "test")
    for start, count in zip(starts, counts, strict=True):
        tenth = max(round(count * HELD_OUT), 1)
        middle = start + tenth * (count > 2)
        split[by_class[start:middle]] = 1
        split[by_class[middle : middle + tenth * (count > 1)]] = 2
    return {name: order[split == number] for number, name in enumerate(names)}


def order_splits(numbers: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of each split in a seeded order, as `make_splits`.

    Args:
      numbers: of the split of each row, integers `[rows]`.
      names: of the splits, by number.
    """
    order = np.random.default_rng(_SEED).permutation(len(numbers))
    numbers = numbers[order]
    return {name: order[numbers == number] for number, name in enumerate(names)}


def check_class_names(names: Sequence[str], *, name: str) -> tuple[str, ...]:
    """Checks that class names can be written to a text file, one per line.

    Returns them as `normalize_name` does. Raises `UserError` if a name is empty or has a line
    break, or beyond `MAX_CLASSES` names.
    """
    for class_name in names:
        if class_name.splitlines() != [class_name]:
            raise UserError(
                f"data.name={name!r}: the class name {class_name!r} is empty or has a line break"
            )
    if len(names) > MAX_CLASSES:
        raise UserError(
            f"data.name={name!r} has {len(names):,} different labels; expected at most "
            f"{MAX_CLASSES:,}"
        )
    return tuple(map(normalize_name, names))
