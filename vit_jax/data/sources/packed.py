# SPDX-License-Identifier: Apache-2.0
"""Datasets written by `vit_jax.data.pack`: smaller JPEGs, or pixels, in few files.

`DST/pack.json` is the manifest. Each shard has `SPLIT-00000-of-00010.npz` with the labels and
captions, which is written after its images, and either an `.array_record` file of JPEGs or its rows
of a file of pixels, uint8 `[rows, size, size, 3]`: `SPLIT.pixels`, or one for each part of a job of
several. An image that could not be read leaves an empty place, so that positions are those of the
source.
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources import riegeli
from vit_jax.data.sources.base import (
    MAX_CLASSES,
    Dataset,
    DatasetInfo,
    Records,
    check_class_names,
)
from vit_jax.data.sources.compact import Ragged
from vit_jax.data.sources.ranges import BucketRanges, is_remote
from vit_jax.utils.bounds import (
    MAX_JSON,
    MAX_TABLE,
    MAX_WEIGHTS,
    check_count,
    is_inside,
    open_npz,
    open_outside,
    open_regular,
    parse_json,
    shorten,
)
from vit_jax.utils.buckets import Bucket
from vit_jax.utils.errors import UserError, describe_error, name_file

MANIFEST = "pack.json"

# Largest numbers in a manifest; ImageNet-21k has 14 million examples.
_MAX_EXAMPLES, _MAX_SHARDS, _MAX_SPLITS, _MAX_SIDE = 2**33, 2**18, 1000, 2**14
_HEADERS = 2**12  # bytes of the headers of three arrays
_THREADS = 16
# Arrays of a shard: see `PackedCaptions`.
CAPTIONS = ("captions", "caption_lengths", "caption_counts")
# Where each JPEG is in its file, which is read in parts from a bucket: see `riegeli`.
PLACES = "places"
_AGAIN = "expected what python -m vit_jax.data.pack wrote: pack it again"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `pack.json`.

    Attributes:
      source: name of the dataset that was packed.
      splits: lengths of its splits.
      num_classes: labels are from 0 to `num_classes` - 1; 0 if there are none.
      multi_label: whether an example may have several labels.
      class_names: names by label, if they are known.
      short_side: limit of the shorter side of the JPEGs; None for pixels.
      quality: of the JPEGs; None for pixels.
      raw: height and width of the pixels; None for JPEGs.
      shard_size: examples of each file except the last of a split.
      cut: whether the source has no splits of its own; see `Dataset`.
      captions: whether the examples have captions.
      parts: files of pixels, each of which has the shards of one part of a job; 1 for JPEGs.
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
    cut: bool = False
    captions: bool = False
    parts: int = 1

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

    def image_files(self) -> dict[str, "Shard"]:
        """The file that has the images of each shard, with the rows that it has, by shard name."""
        shards, files = self.shards(), dict[str, Shard]()
        if self.raw is None:
            return {
                shard.name: dataclasses.replace(shard, name=f"{shard.name}.array_record")
                for shard in shards
            }
        for number in range(self.parts):
            part = select_part(shards, number, self.parts)
            for split, group in itertools.groupby(part, key=lambda shard: shard.split):
                own = list(group)
                suffix = f".part-{number:05}-of-{self.parts:05}" if self.parts > 1 else ""
                file = Shard(f"{split}{suffix}.pixels", split, own[0].start, own[-1].stop)
                files |= dict.fromkeys((shard.name for shard in own), file)
        return files

    def pixel_files(self) -> list["Shard"]:
        """The rows of each file of pixels, split by split."""
        return list(dict.fromkeys(self.image_files().values()))


@dataclasses.dataclass(frozen=True)
class Shard:
    """Examples `start` to `stop` of a split, in the file or files of this name."""

    name: str
    split: str
    start: int
    stop: int


def select_part(shards: Sequence[Shard], number: int, count: int) -> Sequence[Shard]:
    """The shards of part `number` of `count`, from 0; none if there are more parts than shards."""
    start, stop = (len(shards) * n // count for n in (number, number + 1))
    return shards[start:stop]


def read_manifest(folder: str | Path, *, key: str) -> Manifest:
    """Reads `pack.json` in a folder or below a URL; raises `UserError` if it can't be used."""
    where = f"{folder}/{MANIFEST}"
    try:
        with _open(folder, MANIFEST, max_bytes=MAX_JSON) as file:
            return as_manifest(parse_json(file.read()))
    except OSError as e:
        raise UserError(
            f"{key}: {where}: {e.strerror}; expected a folder that "
            "python -m vit_jax.data.pack wrote"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{key}: {where} can't be read: {e}") from None


def as_manifest(values: Any) -> Manifest:
    """The manifest that JSON holds.

    Raises ValueError, TypeError, KeyError or AttributeError unless it is one that makes sense.
    """
    names = values.pop("class_names")
    if not isinstance(names, list | None):
        raise ValueError(f"class_names is {shorten(names)}; expected a list of texts, or null")
    manifest = Manifest(**values, class_names=None if names is None else tuple(names))
    check_manifest(manifest)
    return manifest


@contextlib.contextmanager
def _open(folder: str | Path, name: str, *, max_bytes: int) -> Iterator[BinaryIO]:
    """Opens a file in a folder, or an object below a URL; raises OSError."""
    if not is_remote(str(folder)):
        with open_outside(Path(folder, name), max_bytes=max_bytes) as file:
            yield file
        return
    bucket = Bucket(str(folder))
    content, _ = bucket.read(name)
    if content is None:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", f"{folder}/{name}")
    yield io.BytesIO(content)


def check_manifest(manifest: Manifest) -> None:
    """Raises ValueError unless each value is of its type and of a size that makes sense."""
    if not isinstance(manifest.source, str):
        raise ValueError(f"source is {shorten(manifest.source)}; expected a text")
    if not isinstance(manifest.splits, dict) or not manifest.splits:
        raise ValueError(f"splits is {shorten(manifest.splits)}; expected lengths by name")
    check_count(manifest.shard_size, _MAX_EXAMPLES, "shard_size", least=1)
    check_count(len(manifest.splits), _MAX_SPLITS, "the number of splits")
    for split, length in manifest.splits.items():
        if not is_inside(split) or "/" in split:
            raise ValueError(f"splits has {shorten(split)}, which can't be part of a file's name")
        check_count(length, _MAX_EXAMPLES, f"splits.{shorten(split)}")
    check_count(sum(manifest.splits.values()), _MAX_EXAMPLES, "the number of examples", least=1)
    shards = sum(-(-length // manifest.shard_size) for length in manifest.splits.values())
    check_count(shards, _MAX_SHARDS, "the number of shards")
    check_count(manifest.parts, _MAX_SHARDS, "parts", least=1)
    for name in ("multi_label", "cut", "captions"):
        if type(value := getattr(manifest, name)) is not bool:
            raise ValueError(f"{name} is {shorten(value)}; expected true or false")
    check_count(manifest.num_classes, MAX_CLASSES, "num_classes", least=not manifest.captions)
    for name in ("short_side", "quality", "raw"):
        if (value := getattr(manifest, name)) is not None:
            check_count(value, _MAX_SIDE, name, least=1)
    names = manifest.class_names
    if names is not None:
        if not all(isinstance(name, str) for name in names):
            raise ValueError("class_names has other values than texts")
        check_count(len(names), manifest.num_classes, "the number of class_names")


class Jpegs(Records):
    """JPEGs of the shards, concatenated."""

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self._paths = [str(folder / f"{shard.name}.array_record") for shard in shards]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(_check_records, self._paths, shards))
        self._source = ArrayRecordDataSource(self._paths)
        self._firsts = np.cumsum([0, *(shard.stop - shard.start for shard in shards)])

    def read(self, row: int) -> bytes:
        try:
            encoded = self._source[row]
        except Exception as e:  # Damaged chunks raise errors of several types.
            raise ImageError(f"it can't be read: {describe_error(e)}") from None
        if not encoded:
            raise ImageError("it could not be read when it was packed")
        return encoded

    def shard_bounds(self) -> np.ndarray:
        return self._firsts

    def describe(self, row: int) -> str:
        return f"{os.path.dirname(self._paths[0])}[{row}]"


def _check_records(path: str, shard: Shard) -> None:
    """Raises OSError or ValueError unless a shard has all of its images, none of them compressed.

    A chunk that was compressed could be of any size in memory, and only its reader would know.
    """
    os.close(open_regular(path, max_bytes=MAX_WEIGHTS))
    with name_file(path):
        reader = ArrayRecordReader(path)
        try:
            count, options = reader.num_records(), reader.writer_options_string()
        finally:
            reader.close()
    if count != shard.stop - shard.start:
        raise ValueError(f"{path} has {count:,} images; expected {shard.stop - shard.start:,}")
    if "uncompressed" not in options:
        raise ValueError(f"{path} is compressed ({options[:80]}); expected it to be as packed")


class RemoteJpegs(Records):
    """JPEGs of shards in a bucket, each of which is a request.

    Args:
      url: of the folder.
      shards: names and lengths.
      places: the first byte of what holds each JPEG and the end of it, int64 `[rows, 2]`.
      good: whether each image is there, bool `[rows]`.
    """

    def __init__(self, url: str, shards: Sequence[Shard], places: np.ndarray, good: np.ndarray):
        self._url, self._places, self._good = url, places, good
        self._ranges = BucketRanges([f"{url}/{shard.name}.array_record" for shard in shards])
        self._firsts = np.cumsum([0, *(shard.stop - shard.start for shard in shards)])

    @property
    def reads_ahead(self) -> bool:
        return True

    def _find(self, row: int) -> tuple[int, int, int]:
        start, stop = self._places[row]
        return int(np.searchsorted(self._firsts, row, side="right")) - 1, int(start), int(stop)

    def ahead(self, rows: Sequence[int], *, captions: bool) -> None:
        for row in rows:
            if self._good[row]:
                self._ranges.ahead(*self._find(row))

    def check_objects(self) -> None:
        """Reads the first and the last image of each shard; raises OSError or ValueError."""

        def check(number: int) -> None:
            row = int(self._firsts[number])
            images = row + np.flatnonzero(self._good[row : int(self._firsts[number + 1])])
            if not len(images):
                self._ranges.stamp(number)  # This raises OSError without an object.
            for row in images[[0, -1]] if len(images) else ():
                _, start, stop = self._find(row)
                with name_file(self._ranges.paths[number]):
                    riegeli.unpack(self._ranges.read(number, start, stop), start)

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(check, range(len(self._ranges.paths))))

    def read(self, row: int) -> bytes:
        if not self._good[row]:
            raise ImageError("it could not be read when it was packed")
        number, start, stop = self._find(row)
        try:
            return riegeli.unpack(self._ranges.read(number, start, stop), start)
        except (OSError, ValueError) as e:
            raise ImageError(f"it can't be read: {describe_error(e)}") from None

    def shard_bounds(self) -> np.ndarray:
        return self._firsts

    def describe(self, row: int) -> str:
        return f"{self._url}[{row}]"


class RemotePixels(Records):
    """Pixels of all splits in a bucket, of which each image is a request."""

    @property
    def reads_ahead(self) -> bool:
        return True

    def __init__(self, url: str, manifest: Manifest, good: np.ndarray):
        self._url, self._good, self._side = url, good, manifest.raw or 0
        self._size = self._side**2 * 3
        files = manifest.pixel_files()
        self._ranges = BucketRanges([f"{url}/{file.name}" for file in files])
        self._firsts = np.cumsum([0, *(file.stop - file.start for file in files)])

    def check_objects(self) -> None:
        """Checks the size of each file of pixels; raises OSError or ValueError."""

        def check(number: int) -> None:
            size = int(self._firsts[number + 1] - self._firsts[number]) * self._size
            if len(self._ranges.read(number, size - 1, None)) != 1:
                raise ValueError(f"{self._ranges.paths[number]}: expected {size:,} bytes")

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(check, range(len(self._ranges.paths))))

    def _find(self, row: int) -> tuple[int, int, int]:
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        start = (row - int(self._firsts[number])) * self._size
        return number, start, start + self._size

    def ahead(self, rows: Sequence[int], *, captions: bool) -> None:
        for row in rows:
            if self._good[row]:
                self._ranges.ahead(*self._find(row))

    def read(self, row: int) -> np.ndarray:
        if not self._good[row]:
            raise ImageError("it could not be read when it was packed")
        try:
            content = self._ranges.read(*self._find(row))
        except OSError as e:
            raise ImageError(f"it can't be read: {describe_error(e)}") from None
        if len(content) != self._size:
            raise ImageError(f"{len(content):,} bytes where {self._size:,} were expected")
        return np.frombuffer(content, np.uint8).reshape(self._side, self._side, 3)

    def shard_bounds(self) -> np.ndarray:
        return self._firsts

    def describe(self, row: int) -> str:
        return f"{self._url}[{row}]"


class Pixels(Records):
    """Pixels of all splits, in memory-mapped files."""

    def __init__(self, folder: Path, manifest: Manifest, good: np.ndarray):
        self._folder, self._good = folder, good
        size = manifest.raw or 0
        self._files = []
        for file in manifest.pixel_files():
            path, rows = folder / file.name, file.stop - file.start
            expected = rows * size**2 * 3
            os.close(open_regular(path, max_bytes=expected))
            if (found := path.stat().st_size) != expected:
                raise ValueError(f"{path} has {found:,} bytes; expected {expected:,}")
            mapped = np.memmap(path, np.uint8, "r", 0, (rows, size, size, 3))
            self._files.append(np.asarray(mapped))  # Plain arrays are faster to index.
        self._starts = (0, *itertools.accumulate(map(len, self._files)))
        self._firsts = np.cumsum([0, *(shard.stop - shard.start for shard in manifest.shards())])

    def read(self, row: int) -> np.ndarray:
        if not self._good[row]:
            raise ImageError("it could not be read when it was packed")
        number = bisect.bisect_right(self._starts, row) - 1
        return self._files[number][row - self._starts[number]]

    def shard_bounds(self) -> np.ndarray:
        return self._firsts

    def describe(self, row: int) -> str:
        return f"{self._folder}[{row}]"


def open_files(
    folder: str, manifest: Manifest, *, key: str, advice: str
) -> tuple[Any, np.ndarray, "PackedCaptions | None", Records]:
    """Opens all shards of a folder or URL.

    Returns labels, whether each image is there, bool `[rows]`, captions and images.

    Raises `UserError`, which ends in `advice`, if one is missing or not as it was written.
    """
    shards, remote = manifest.shards(), is_remote(folder)
    try:
        labels, good, captions, places = _read_labels(folder, manifest, shards, key=key)
        if remote and manifest.raw is None:
            records: Records = RemoteJpegs(folder, shards, places, good)
        elif remote:
            records = RemotePixels(folder, manifest, good)
        elif manifest.raw is None:
            records = Jpegs(Path(folder), shards)
        else:
            records = Pixels(Path(folder), manifest, good)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{key}: {e.filename} can't be read: {e.strerror}; {advice}") from None
    # Damaged files raise errors of many types.
    except Exception as e:
        raise UserError(f"{key} can't be read: {describe_error(e)}; {advice}") from None
    return labels, good, captions, records


def check_objects(records: Records, *, key: str, advice: str) -> None:
    """Checks that each shard in a bucket has its images, by a part of them.

    Raises `UserError`, which ends in `advice`, if one has not.
    """
    assert isinstance(records, RemoteJpegs | RemotePixels)
    try:
        records.check_objects()
    except FileNotFoundError as e:
        raise UserError(f"{key}: {e.filename}: {e.strerror}; {advice}") from None
    except (OSError, ValueError) as e:
        text = e.strerror if isinstance(e, OSError) else e
        raise UserError(f"{key}: {text}; {advice}") from None


@functools.cache
def _dataset(path: str, kind: str) -> Dataset:
    """Opens a packed dataset; splits, rows and labels are those of its source.

    Raises `UserError` if it is missing, unfinished, or of the other kind.
    """
    name = f"{kind}:{path}"
    key = f"data.name={name!r}"
    remote = is_remote(path)
    folder = path.rstrip("/") if remote else str(Path(path).expanduser().absolute())
    manifest = read_manifest(folder, key=key)
    if manifest.kind != kind:
        raise UserError(f"{key}: expected {manifest.kind}:{path}, by what is in it")
    labels, _, captions, records = open_files(folder, manifest, key=key, advice=_AGAIN)
    size = manifest.raw
    names = manifest.class_names
    class_names = None if names is None else check_class_names(names, name=name)
    info = DatasetInfo(
        manifest.num_classes,
        (size, size, 3),
        class_names,
        manifest.multi_label,
        captions=manifest.captions,
    )
    starts = itertools.accumulate(manifest.splits.values(), initial=0)
    splits = {
        split: np.arange(start, start + length)
        for start, (split, length) in zip(starts, manifest.splits.items(), strict=False)
    }
    return Dataset(name, info, records, labels, splits, manifest.cut, captions)


class PackedCaptions:
    """Captions of all rows, as UTF-8 in one array.

    Args:
      text: all captions, uint8 `[bytes]`.
      lengths: bytes of each caption, int64 `[captions]`.
      counts: captions of each row, int64 `[rows]`.
    """

    def __init__(self, text: np.ndarray, lengths: np.ndarray, counts: np.ndarray):
        self._text = text
        self._starts = np.cumsum(np.append(0, lengths))
        self._firsts = np.cumsum(np.append(0, counts))

    def __getitem__(self, row: int) -> list[str]:
        bounds = self._starts[self._firsts[row] : self._firsts[row + 1] + 1]
        parts = (self._text[start:stop] for start, stop in itertools.pairwise(bounds))
        return [part.tobytes().decode("utf-8", "replace") for part in parts]


def _read_labels(
    folder: str, manifest: Manifest, shards: Sequence[Shard], *, key: str
) -> tuple[Any, np.ndarray, PackedCaptions | None, np.ndarray]:
    """Returns labels, whether each image is there, bool `[rows]`, captions, and places of images.

    The places, int64 `[rows, 2]`, are those of JPEGs in a bucket. Raises `UserError` if shards are
    missing.
    """

    def read(shard: Shard) -> tuple[np.ndarray, ...] | None:
        try:
            with name_file(str(Path(folder, f"{shard.name}.npz"))):
                return _read_shard(folder, shard, manifest)
        except FileNotFoundError:
            return None

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(read, shards))
    missing = [shard.name for shard, part in zip(shards, parts, strict=True) if part is None]
    if missing:
        raise UserError(
            f"{key}: {len(missing)} of {len(shards)} shards are missing, such as {missing[0]}: "
            + (
                "copy all files of the pack there"
                if is_remote(folder)
                else "run the same python -m vit_jax.data.pack again"
            )
        )
    found = [part for part in parts if part is not None]
    values, counts, good, places, *text = map(np.concatenate, zip(*found, strict=True))
    captions = PackedCaptions(*text) if manifest.captions else None
    if not manifest.num_classes:
        return np.zeros(len(good), np.int32), good, captions, places
    if not manifest.multi_label:
        return values, good, captions, places
    return Ragged(values, counts), good, captions, places


def _read_shard(folder: str, shard: Shard, manifest: Manifest) -> tuple[np.ndarray, ...]:
    rows, path = shard.stop - shard.start, Path(folder, f"{shard.name}.npz")
    most = rows * (manifest.num_classes if manifest.multi_label else 1)
    bound = None if manifest.captions else 8 * (most + 4 * rows) + _HEADERS
    needs_places = is_remote(folder) and manifest.raw is None
    with (
        _open(folder, f"{shard.name}.npz", max_bytes=MAX_TABLE) as file,
        open_npz(file, max_bytes=bound) as arrays,
    ):
        labels, counts, good = (arrays[name] for name in ("labels", "counts", "good"))
        text = [arrays[name] for name in CAPTIONS] if manifest.captions else []
        places = np.zeros((rows, 2), np.int64)
        if needs_places:
            if PLACES not in arrays:
                raise UserError(
                    f"{folder} was packed without the places of its images, which reading from a "
                    "bucket needs: pack it again, or copy it to a disk"
                )
            places = arrays[PLACES]
    if places.shape != (rows, 2) or places.dtype.kind != "i" or np.any(places < 0):
        raise ValueError(f"{path} has no two places for each image")
    whole = labels.dtype.kind == counts.dtype.kind == "i" and good.dtype == bool
    if not whole or counts.shape != (rows,) or good.shape != (rows,) or labels.ndim != 1:
        raise ValueError(f"{path} is of other types or of another length than its split")
    right = manifest.multi_label or np.all(counts == (1 if manifest.num_classes else 0))
    if np.any(counts < 0) or counts.sum() != len(labels) or not right:
        raise ValueError(f"{path} has {len(labels):,} labels for {rows:,} examples")
    for place in np.flatnonzero((labels < 0) | (labels >= manifest.num_classes))[:1]:
        row = shard.start + int(np.searchsorted(np.cumsum(counts), place, side="right"))
        raise ValueError(
            f"{path}: {shard.split}[{row}] has label {labels[place]}; expected 0 to "
            f"{manifest.num_classes - 1}"
        )
    if text:
        _check_captions(*text, rows=rows, path=path)
    return labels, counts, good, places, *text


def _check_captions(
    text: np.ndarray, lengths: np.ndarray, counts: np.ndarray, *, rows: int, path: Path
) -> None:
    whole = text.dtype == np.uint8 and lengths.dtype.kind == counts.dtype.kind == "i"
    if not whole or {text.ndim, lengths.ndim} != {1} or counts.shape != (rows,):
        raise ValueError(f"{path} has captions of other types or of another length than its split")
    if min(lengths.min(initial=0), counts.min(initial=0)) < 0 or (
        (lengths.sum(), counts.sum()) != (len(text), len(lengths))
    ):
        raise ValueError(f"{path} has {len(text):,} bytes of captions, which are not as it says")


packed_dataset = functools.partial(_dataset, kind="packed")
raw_dataset = functools.partial(_dataset, kind="raw")
