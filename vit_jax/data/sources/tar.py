# SPDX-License-Identifier: Apache-2.0
"""Datasets in tar shards, in the layout of WebDataset: any sample is read by its position."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import re
import socket
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.base import Dataset, DatasetInfo, Records, make_splits
from vit_jax.data.sources.columns import split_columns
from vit_jax.data.sources.compact import Ragged
from vit_jax.data.sources.files import ENDINGS, check_store, encode_labels
from vit_jax.data.sources.guess import suggest_name
from vit_jax.data.sources.layout import check_classes, find_split, log_cut
from vit_jax.data.sources.ranges import Ranges, find_files, is_remote, open_ranges
from vit_jax.data.sources.tar_index import (
    MAX_TEXT,
    Choice,
    Index,
    index_shard,
    look_up,
    member_names,
)
from vit_jax.utils.bounds import parse_json
from vit_jax.utils.class_names import read_names
from vit_jax.utils.errors import UserError, describe_error

# What endings, or values in `.json`, may be named for.
COLUMNS = ("image", "label", "caption")
# Files with the names of classes, in the folder of the shards or in that above it.
_NAMES = ("classes.txt", "classnames.txt")
_HEADER = 512
# Numbers or letters in braces, with a step of any sign.
_SPAN = re.compile(
    r"(?=\d+\.\.\d|[a-z]\.\.[a-z]|[A-Z]\.\.[A-Z])"  # both of one kind
    r"(\d{1,9}|[A-Za-z])\.\.(\d{1,9}|[A-Za-z])(?:\.\.-?(\d{1,9}))?",
    re.ASCII,
)
# What is read where a name does not say otherwise.
DEFAULT = Choice(image=tuple(ending.removeprefix(".") for ending in ENDINGS))
_GAP = 2**16  # bytes between two images that are read in one go
_MAX_SHARDS = 2**20
_SECONDS = 10  # between lines on progress
_READERS = 16  # threads that read shards, which mostly wait for the file system

logger = logging.getLogger(__name__)


@functools.cache
def tar_dataset(text: str) -> Dataset:
    """A dataset of the tar files of a pattern, with `{000..146}`, `{a,b}` or `*`, or of a folder.

    The members of a sample share the path up to the first dot of the file's name, its key. The
    image is the member with the ending of an image; the label is that of `.cls`, or the value
    `label` in `.json`; the captions are the lines of `.txt`, or `caption` in `.json`. After the
    pattern, `#image=jpg,label=json.class_id,caption=json.title` gives other endings, or other
    values in `.json`. Class names are the labels, or the lines of `classes.txt` beside the shards.
    The split is a word in the shard's name, or the name of its folder; without any, `make_splits`
    cuts the samples.

    The index of each shard is made once and stored; see `tar_index`.

    Raises:
      UserError: there are no shards, or one can't be read.
    """
    name = f"tar:{text}"
    key = f"data.name={name!r}"
    path, renamed = split_columns(text, COLUMNS)
    return read_shards(_find_shards(path, key=key), renamed, name=name)


def read_shards(
    paths: Sequence[str],
    renamed: Mapping[str, str],
    *,
    name: str,
    splits: Sequence[str | None] | None = None,
) -> Dataset:
    """The dataset of tar files, as `tar_dataset`.

    Args:
      paths: or URLs of the shards, in their order.
      renamed: endings or `json.KEY`, by what they hold.
      name: of the dataset.
      splits: of each shard; None for those that the paths name.

    Raises:
      UserError: a shard can't be read, or only some of them have a split.
    """
    key = f"data.name={name!r}"
    given = {column: (chosen.removeprefix(".").lower(),) for column, chosen in renamed.items()}
    for column in ("label", "caption"):
        if column in renamed:  # Names of values in JSON have a case.
            given[column] = (renamed[column].removeprefix("."),)
    choice = dataclasses.replace(DEFAULT, **given)
    ranges = open_ranges(paths)
    try:
        indices = _index(ranges, choice, name=name)
    except UserError as e:
        raise UserError(f"{key}: {e}") from None
    _log_notes(name, ranges.paths, indices)
    rows = sum(len(index.images) for index in indices)
    found = _describe_endings(indices)
    if not rows:
        expected = "".join(f".{ending}" for ending in renamed.get("image", "").split()) or "images"
        raise UserError(
            f"{key} has no samples with {expected}: its members end in {found}; "
            "tar:PATTERN#image=ENDING names another"
        )
    captioned = any(index.captions.any() for index in indices)
    labelled = any(index.values for index in indices)
    for column, there in (("label", labelled), ("caption", captioned)):
        if column in renamed and not there:
            raise UserError(
                f"{key}: no sample has {renamed[column]!r} for its {column}; its members end in "
                f"{found}: expected an ending, or json.KEY"
            )
    if not (labelled or captioned):
        raise UserError(
            f"{key} has neither labels nor captions: its members end in {found}; expected .cls, "
            ".txt, or label or caption in .json; others are given as in "
            "tar:PATTERN#label=json.class_id"
        )
    samples = Members(ranges, indices)
    shape = (None, None, 3)
    if labelled:
        info, labels = _encode(indices, samples, ranges.paths, captioned=captioned, name=name)
    else:
        info = DatasetInfo(0, shape, captions=True)
        labels = np.zeros(rows, np.int32)
    of_shards = [split_of(path) for path in ranges.paths] if splits is None else splits
    rows_of, cut = _split(ranges.paths, of_shards, indices, labels, key=key)
    check_classes(name, info, labels, rows_of)
    captions = MemberCaptions(samples, choice) if captioned else None
    dataset = Dataset(name, info, samples, labels, rows_of, cut=cut, captions=captions)
    log_cut(dataset)
    return dataset


def _find_shards(path: str, *, key: str) -> list[str]:
    """The paths of all shards in their order; raises `UserError` if one is missing."""
    check_store(path, where=f"{key}: ")
    where = path if is_remote(path) else os.path.abspath(os.path.expanduser(path))
    if not is_remote(path) and os.path.isdir(where):
        if not (paths := find_files(where, ending=".tar")):
            hint = suggest_name(path, besides="tar")
            raise UserError(f"{key}: there are no files {where}/**/*.tar{hint}")
        return paths
    if os.path.lexists(where):
        return [where]
    found: dict[str, None] = {}  # ordered, and each once
    missing = []
    for pattern in itertools.islice(expand_braces(where), _MAX_SHARDS):
        try:
            paths = find_files(pattern, ending=".tar")
        except OSError as e:
            raise UserError(f"{key}: {e.strerror}") from None
        except UserError as e:
            raise UserError(f"{key}: {e}") from None
        missing += [] if paths else [pattern]
        found |= dict.fromkeys(paths)
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise UserError(f"{key}: there are no files {missing[0]}{more}")
    return list(found)


def expand_braces(pattern: str) -> Iterator[str]:
    """Yields what bash makes of `{a,b}`, `{000..146}`, `{0..10..5}` and `{a..c}`, in its order."""
    for start, end in _find_braces(pattern):
        inside = pattern[start + 1 : end]
        if (span := _SPAN.fullmatch(inside)) is not None:
            parts: Iterator[str] = _count(*span.groups())
        elif len(several := _split_commas(inside)) > 1:
            parts = itertools.chain.from_iterable(map(expand_braces, several))
        else:
            continue
        for part in parts:
            for rest in expand_braces(pattern[end + 1 :]):
                yield f"{pattern[:start]}{part}{rest}"
        return
    yield pattern


def _count(start: str, stop: str, by: str | None) -> Iterator[str]:
    """Yields the numbers or letters from `start` to `stop`, which may be before it."""
    numbers = start.isdigit()
    first, last = (int(start), int(stop)) if numbers else (ord(start), ord(stop))
    step = (int(by or 1) or 1) * (1 if first <= last else -1)
    padded = numbers and any(len(bound) > 1 and bound[0] == "0" for bound in (start, stop))
    zeros = max(len(start), len(stop)) if padded else 0
    for n in range(first, last + (1 if step > 0 else -1), step):
        yield f"{n:0{zeros}}" if numbers else chr(n)


def _find_braces(pattern: str) -> Iterator[tuple[int, int]]:
    """The places of each opening brace and of the one that closes it."""
    for start, letter in enumerate(pattern):
        depth = 0
        if letter != "{":
            continue
        for end in range(start, len(pattern)):
            depth += {"{": 1, "}": -1}.get(pattern[end], 0)
            if depth == 0:
                yield start, end
                break


def _split_commas(text: str) -> list[str]:
    """Splits a text at commas that are not in braces."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _index(ranges: Ranges, choice: Choice, *, name: str) -> list[Index]:
    """The indices of all shards; progress is logged if some are made."""
    count = len(ranges.paths)
    logged = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(min(_READERS, count))
    found: dict[int, Index] = {}
    made, file = 0, None
    # Hosts that share a folder of indices start at different shards, and so share the work.
    first = zlib.crc32(socket.gethostname().encode())
    numbers = [(first + n) % count for n in range(count)]
    try:
        futures = {pool.submit(index_shard, ranges, n, choice): n for n in numbers}
        for future in concurrent.futures.as_completed(futures):
            index, new = future.result()
            found[futures[future]] = index
            made += new
            file = index.file or file
            if time.monotonic() - logged > _SECONDS:
                logged = time.monotonic()
                logger.info("%s: indexed %s of %s shards", name, f"{len(found):,}", f"{count:,}")
    finally:
        pool.shutdown(cancel_futures=True)
    if made:
        logger.info(
            "%s: made the index of %s shards, %s samples%s",
            name,
            f"{made:,}",
            f"{sum(len(index.images) for index in found.values()):,}",
            f", and stored it in {file.parent}" if file else "",
        )
    return [found[number] for number in range(count)]


def _log_notes(name: str, paths: Sequence[str], indices: Sequence[Index]) -> None:
    """Logs what is odd about shards, one line for each kind."""
    texts = {
        "image": "left out %s keys without an image, the first of them %s",
        "other": "left out %s members that are no files KEY.ENDING, the first of them %s",
        "link": "left out %s hard links to what is no file before them, the first of them %s",
        "apart": "%s members are not beside the others of their key, which are read together; "
        "the first is of %s",
        "open": "%s shards lack the mark of their end: they may have been cut, or the program that "
        "wrote them was; the first is %s",
    }
    for kind, text in texts.items():
        cases = [
            (index.notes[kind], path)
            for path, index in zip(paths, indices, strict=True)
            if kind in index.notes
        ]
        if cases:
            (_, first), path = cases[0]
            where = path if kind == "open" else f"{first} in {path}"
            count = sum(number for (number, _), _ in cases)
            log = logger.warning if kind == "open" else logger.info
            log(f"%s: {text}", name, f"{count:,}", where)


def _describe_endings(indices: Sequence[Index]) -> str:
    counts: dict[str, int] = {}
    for index in indices:
        for ending, count in index.endings.items():
            counts[ending] = counts.get(ending, 0) + count
    most = sorted(counts, key=lambda ending: (-counts[ending], ending))[:6]
    return ", ".join(f".{ending} ({counts[ending]:,})" for ending in most) or "nothing"


def _encode(
    indices: Sequence[Index],
    samples: "Members",
    paths: Sequence[str],
    *,
    captioned: bool,
    name: str,
) -> tuple[DatasetInfo, Any]:
    """The facts about the dataset, and the label or labels of each sample."""
    several = any(index.several for index in indices)
    row_of: dict[Any, tuple[int, int]] = {}  # the shard and the number of each value
    for shard, index in enumerate(indices):
        for code, value in enumerate(index.values):
            row_of.setdefault(value, (shard, code))

    def describe(place: int) -> str:
        value = values[place]
        shard, code = row_of[value]
        index = indices[shard]
        first = int(np.flatnonzero(index.labels == code)[0])
        row = int(np.searchsorted(np.cumsum(index.counts), first, side="right"))
        return samples.describe(int(samples.firsts[shard]) + row)

    values = list(row_of)
    info, codes = encode_labels(
        values,
        multi_label=False,
        name=name,
        class_names=_class_names(values, paths, name=name),
        describe=describe,
    )
    code_of = dict(zip(values, codes.tolist(), strict=True))
    flat, counts = [], []
    for index in indices:
        table = np.array([code_of[value] for value in index.values], np.int32)
        flat.append(table[index.labels] if len(table) else np.zeros(0, np.int32))
        counts.append(index.counts)
    labels, number = np.concatenate(flat), np.concatenate(counts)
    info = DatasetInfo(
        info.num_classes, info.image_shape, info.class_names, several, captions=captioned
    )
    if several:
        return info, Ragged(labels, number)
    single = np.full(len(number), -1, np.int32)
    single[number == 1] = labels
    return info, single


def _class_names(values: Sequence[Any], paths: Sequence[str], *, name: str) -> list[str] | None:
    """The class names beside the shards, if labels are integers."""
    if not all(re.fullmatch(r"0|[1-9]\d*", str(value)) for value in values):
        return None
    folder = os.path.dirname(paths[0])
    if is_remote(folder):
        return None
    for place in (folder, os.path.dirname(folder)):
        for file in _NAMES:
            if (path := Path(place, file)).is_file():
                names = read_names(path, key=str(path))
                logger.info(
                    "%s: the names of its %d classes are those of %s", name, len(names), path
                )
                return list(names)
    return None


def _split(
    paths: Sequence[str],
    of_shards: Sequence[str | None],
    indices: Sequence[Index],
    labels: Any,
    *,
    key: str,
) -> tuple[dict[str, np.ndarray], bool]:
    """The rows of each split, and whether they were cut, from the split of each shard."""
    if not any(of_shards):
        return make_splits(labels, None), True
    if None in of_shards:
        raise UserError(
            f"{key}: {paths[of_shards.index(None)]} is not named for a split, and others are: "
            "expected all, as in train-000.tar, or none"
        )
    lengths = [len(index.images) for index in indices]
    firsts = np.cumsum([0, *lengths])
    splits: dict[str, list[np.ndarray]] = {}
    for split, first, length in zip(of_shards, firsts, lengths, strict=False):
        splits.setdefault(str(split), []).append(np.arange(first, first + length))
    # The order of the shards is kept: evaluation then reads each from its start to its end.
    return {split: np.concatenate(rows) for split, rows in sorted(splits.items())}, False


def split_of(path: str) -> str | None:
    """The split that a word of the shard's name means, or else the name of its folder."""
    folder, file = os.path.split(path)
    words = {find_split(word) for word in re.split(r"[-_.]", file)} - {None}
    return words.pop() if len(words) == 1 else find_split(os.path.basename(folder))


class Members(Records):
    """The images of all shards.

    Attributes:
      firsts: the row of the first image of each shard, and the number of rows, int64.
    """

    def __init__(self, ranges: Ranges, indices: Sequence[Index]):
        self._ranges = ranges
        self._images = np.concatenate([index.images for index in indices])
        self._captions = np.concatenate([index.captions for index in indices])
        self._files = [index.file for index in indices]
        self.firsts = np.cumsum([0, *(len(index.images) for index in indices)])

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self.firsts, row, side="right")) - 1

    def read(self, row: int) -> bytes:
        start, size = self._images[row]
        return self._read(row, int(start), int(size))

    def read_caption(self, row: int) -> tuple[bytes, bool]:
        """The member with the captions of a row, none if it is empty; whether it is JSON."""
        start, size = self._captions[row]
        if abs(size) > MAX_TEXT:
            raise ImageError(f"its text has {abs(size):,} bytes; expected {MAX_TEXT:,} at most")
        return self._read(row, int(start), abs(int(size))) if size else b"", bool(size < 0)

    def _read(self, row: int, start: int, size: int) -> bytes:
        # The header before the content shows whether the shard is the one that was indexed.
        try:
            content = self._ranges.read(self._shard(row), start - _HEADER, start + size)
        except OSError as e:
            raise ImageError(f"it can't be read: {describe_error(e)}") from e
        if len(content) < _HEADER + size or not _is_header(content[:_HEADER], size):
            raise ImageError("its shard has changed since its index was made")
        return content[_HEADER:]

    @property
    def reads_ahead(self) -> bool:
        return self._ranges.reads_ahead

    def ahead(self, rows: Sequence[int], *, captions: bool) -> None:
        for row in rows:
            shard = self._shard(row)
            for places in (self._images, self._captions) if captions else (self._images,):
                start, size = map(int, places[row])
                if size:
                    self._ranges.ahead(shard, start - _HEADER, start + abs(size))

    def shard_bounds(self) -> np.ndarray:
        return self.firsts

    def read_through(self, rows: Sequence[int]) -> None:
        # Other members are between the images; it is faster to read them too than to skip them.
        part: tuple[int, int, int] | None = None
        for row in rows:
            shard, (start, size) = self._shard(row), map(int, self._images[row])
            if part and part[0] == shard and 0 <= start - _HEADER - part[2] <= _GAP:
                part = shard, part[1], start + size
            else:
                self._read_part(part)
                part = shard, start - _HEADER, start + size
        self._read_part(part)

    def _read_part(self, part: tuple[int, int, int] | None) -> None:
        if part is not None:
            with contextlib.suppress(OSError):  # `read` reports it.
                self._ranges.read_through(*part)

    def describe(self, row: int) -> str:
        shard = self._shard(row)
        within, path = row - int(self.firsts[shard]), self._ranges.paths[shard]
        try:
            file = self._files[shard]
            return f"{path}/{member_names(file)[within]}" if file else f"{path}[{within}]"
        except (OSError, ValueError, IndexError, KeyError):  # The folder of caches was emptied.
            return f"{path}[{within}]"


def _is_header(block: bytes, size: int) -> bool:
    """Whether a block is the header of a member of this size."""
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    try:
        if int(block[148:156].rstrip(b"\0 ") or b"0", 8) != total:
            return False
        # Large sizes are in another header, or not octal.
        return block[124] & 0x80 > 0 or int(block[124:136].rstrip(b"\0 ") or b"0", 8) == size
    except ValueError:
        return False


class MemberCaptions:
    """The captions of each row of tar shards."""

    def __init__(self, samples: Members, choice: Choice):
        self._samples = samples
        jsons = (c.partition(".") for c in choice.caption)
        self._keys = [key for ending, _, key in jsons if ending == "json" and key]

    def __getitem__(self, row: int) -> list[str]:
        content, is_json = self._samples.read_caption(row)
        try:
            if not is_json:
                return content.decode("utf-8-sig").splitlines()
            value = parse_json(content)
            found = next(v for key in self._keys if (v := look_up(value, key)) is not None)
            texts = found if isinstance(found, list) else [found]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("expected a text, or a list of texts")
            return texts
        except (ValueError, StopIteration) as e:
            raise ImageError(f"its text can't be read: {describe_error(e)}") from e
