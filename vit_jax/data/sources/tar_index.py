# SPDX-License-Identifier: Apache-2.0
"""The index of a tar shard: where its images and captions are, and their labels.

`tarfile` reads a shard once. Its index is kept as `.npz` in the folder of caches, by the path of
the shard and by what is read of it, with the stamp of the shard that it is of: an index whose shard
has changed since is made again.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vit_jax.data.sources.ranges import Ranges
from vit_jax.utils.bounds import (
    MAX_IMAGE,
    MAX_TABLE,
    open_npz,
    open_outside,
    parse_json,
    shorten,
)
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.files import write_atomically

# Changes with the content of indexes, so that those of an earlier kind are made again.
_VERSION = 2
_BLOCK = tarfile.BLOCKSIZE
# Bytes of a label, and of a text or JSON value.
_MAX_LABEL, MAX_TEXT = 2**16, 2**20
_ENDED = 2**20  # bytes after the end of a shard that are looked at
_JSON = "json"
# The key of a sample is the path up to the first dot of the file's name.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
# How compressed files start.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is read of a sample, as endings of members, or `json.KEY` for a value in its `.json`.

    Attributes:
      image: endings, without a dot and in lower case.
      label: the first of these that a sample has counts.
      caption: likewise.
    """

    image: tuple[str, ...]
    label: tuple[str, ...] = ("cls", "json.label")
    caption: tuple[str, ...] = ("txt", "json.caption")


@dataclasses.dataclass(frozen=True)
class Index:
    """The samples of a shard in their order.

    Attributes:
      images: the first byte of each image and their number, int64 `[samples, 2]`.
      captions: likewise, zeros where there is none.
      labels: indices into `values`, int32 `[labels]`.
      counts: labels of each sample, int32 `[samples]`.
      values: the different labels.
      several: whether labels are lists.
      notes: what is odd about the shard: a number and the first case by kind.
      endings: the number of members by ending.
      file: the stored index; None if it could not be stored.
    """

    images: np.ndarray
    captions: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    values: list[Any]
    several: bool
    notes: Mapping[str, tuple[int, str]]
    endings: Mapping[str, int]
    file: Path | None = None


def index_shard(ranges: Ranges, number: int, choice: Choice) -> tuple[Index, bool]:
    """Returns the index of a shard, and whether it is new: it is read, or made and stored.

    Raises:
      UserError: the shard can't be read, or its members are not those of samples.
    """
    path = ranges.paths[number]
    try:
        file, about = _describe(ranges, number, choice)
        if (known := _read(file, about)) is not None:
            return known, False
        with ranges.open(number) as content:
            index, names = _make(content, path, choice)
        if ranges.stamp(number) != about["stamp"]:
            raise UserError(f"{path} was written to while it was read: try again once it is whole")
    except OSError as e:
        raise UserError(f"{path} can't be read: {e.strerror or describe_error(e)}") from None
    try:
        _write(file, index, names, about)
    except OSError as e:
        logger.warning(
            "the index of %s can't be stored in %s (%s): it is made again at each start",
            path,
            file.parent,
            e.strerror or describe_error(e),
        )
        return index, True
    return dataclasses.replace(index, file=file), True


def store(ranges: Ranges, number: int, choice: Choice, index: Index, names: Sequence[str]) -> None:
    """Stores the index of a shard as it is now, with the names of its images; raises OSError."""
    file, about = _describe(ranges, number, choice)
    _write(file, index, names, about)


def _describe(ranges: Ranges, number: int, choice: Choice) -> tuple[Path, dict[str, Any]]:
    """The file of an index, and what it must be of; raises OSError."""
    path = ranges.paths[number]
    about = {
        "version": _VERSION, "shard": path, "stamp": ranges.stamp(number), **_as_json(choice)
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps([path, _as_json(choice)]).encode()).hexdigest()
    return cache_folder() / f"{digest[:32]}.npz", about


def cache_folder() -> Path:
    """The folder of indexes: below `XDG_CACHE_HOME` or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vit_jax" / "tar"


@functools.lru_cache(maxsize=8)
def member_names(file: Path) -> list[str]:
    """The names of the images of an index in the shard; raises OSError or ValueError."""
    with open_outside(file, max_bytes=MAX_TABLE) as opened, open_npz(opened) as arrays:
        text, ends = arrays["names"].tobytes(), arrays["ends"]
    bounds = itertools.pairwise([0, *ends.tolist()])
    return [text[start:stop].decode("utf-8", "replace") for start, stop in bounds]


def _as_json(choice: Choice) -> dict[str, list[str]]:
    return {key: list(value) for key, value in dataclasses.asdict(choice).items()}


_ARRAYS = ("images", "captions", "labels", "counts")


def _write(file: Path, index: Index, names: Sequence[str], about: Mapping[str, Any]) -> None:
    encoded = [name.encode("utf-8", "replace") for name in names]
    facts = {key: getattr(index, key) for key in ("values", "several", "notes", "endings")}
    text = json.dumps({**about, **facts}).encode()
    content = io.BytesIO()
    np.savez(
        content,
        about=np.frombuffer(text, np.uint8),
        names=np.frombuffer(b"".join(encoded), np.uint8),
        ends=np.cumsum([len(name) for name in encoded], dtype=np.int64),
        **{key: getattr(index, key) for key in _ARRAYS},
    )
    # Another host may store the same index at the same time.
    own = file.with_suffix(f".{uuid.uuid4().hex}")
    write_atomically(own, content.getvalue())
    os.replace(own, file)


def _read(file: Path, about: Mapping[str, Any]) -> Index | None:
    """A stored index; None if there is none of this shard as it is now."""
    try:
        with open_outside(file, max_bytes=MAX_TABLE) as opened, open_npz(opened) as arrays:
            stored = parse_json(arrays["about"].tobytes())
            if {key: stored.pop(key, None) for key in about} != about:
                return None
            images, captions, labels, counts = (arrays[key] for key in _ARRAYS)
        rows = len(images)
        whole = {array.dtype.kind for array in (images, captions, labels, counts)} == {"i"}
        shapes = (images.shape, captions.shape, labels.shape, counts.shape)
        if not whole or shapes != ((rows, 2), (rows, 2), (counts.sum(),), (rows,)):
            raise ValueError("its arrays are of other shapes")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(stored["values"]):
            raise ValueError("its labels are out of range")
        notes = {kind: (int(n), str(first)) for kind, (n, first) in stored.pop("notes").items()}
        return Index(images, captions, labels, counts, notes=notes, **stored, file=file)
    except FileNotFoundError:
        return None
    except Exception as e:  # Damaged files raise errors of many types.
        logger.warning("%s is damaged (%s): it is made again", file, describe_error(e))
        return None


def _make(content: BinaryIO, path: str, choice: Choice) -> tuple[Index, list[str]]:
    """The index of a shard, and the names of its images."""
    members, endings, notes = _list_members(content, path)
    images: list[tuple[int, int]] = []
    captions: list[tuple[int, int]] = []
    labels: list[int] = []
    counts: list[int] = []
    names: list[str] = []
    code_of: dict[Any, int] = {}
    several = False
    for key, parts in members.items():
        found = [ending for ending in choice.image if ending in parts]
        if len(found) > 1:
            raise UserError(
                f"{path}: {key} has {len(found)} images, .{found[0]} and .{found[1]}: expected "
                f"one; tar:PATTERN#image={found[0]} names the one to read"
            )
        if not found:
            _note(notes, "image", key)
            continue
        name, start, size = parts[found[0]]
        if size > MAX_IMAGE:
            raise UserError(f"{path}: {name} has {size:,} bytes; expected {MAX_IMAGE:,} at most")
        sample = _Sample(content, path, parts)
        images.append((start, size))
        captions.append(sample.find_caption(choice.caption))
        names.append(name)
        label = sample.find_label(choice.label)
        several |= isinstance(label, list)
        own = label if isinstance(label, list) else [] if label is None else [label]
        labels += [code_of.setdefault(one, len(code_of)) for one in own]
        counts.append(len(own))
    index = Index(
        np.array(images, np.int64).reshape(-1, 2),
        np.array(captions, np.int64).reshape(-1, 2),
        np.array(labels, np.int32),
        np.array(counts, np.int32),
        list(code_of),
        several,
        notes,
        endings,
    )
    return index, names


def _note(notes: dict[str, tuple[int, str]], kind: str, case: str) -> None:
    count, first = notes.get(kind, (0, case))
    notes[kind] = count + 1, first


# The name of a member, the first of its bytes, and their number.
_Member = tuple[str, int, int]


def _list_members(
    content: BinaryIO, path: str
) -> tuple[dict[str, dict[str, _Member]], dict[str, int], dict[str, tuple[int, str]]]:
    """The members of each key by ending, the number of each ending, and notes."""
    start = content.read(8)
    for magic, program in _PACKED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed by {program}: expected a plain tar file, of which any part "
                "can be read; images hardly become smaller"
            )
    content.seek(0, os.SEEK_SET)
    members: dict[str, dict[str, _Member]] = {}
    endings: Counter[str] = Counter()
    notes: dict[str, tuple[int, str]] = {}
    places: dict[str, tuple[int, int]] = {}
    last = name = ""
    try:
        tar = tarfile.TarFile(fileobj=content)
        while (member := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # It keeps them all.
            name = member.name
            if member.isdir():
                continue
            place = None
            if member.isreg() and not member.issparse():
                place = member.offset_data, member.size
            elif member.islnk():  # GNU tar writes so the second of two files that are one.
                place = places.get(os.path.normpath(member.linkname))
                if place is None:
                    _note(notes, "link", f"{name} to {member.linkname}")
                    continue
                if os.path.normpath(member.linkname) == os.path.normpath(name):
                    continue  # It was given twice to the program that wrote the shard.
            if place is not None:
                places[os.path.normpath(name)] = place
            parsed = _NAME.fullmatch(name)
            if parsed is None or place is None:
                _note(notes, "other", name)
                continue
            key, ending = parsed[1], parsed[2].lower()
            endings[ending] += 1
            parts = members.setdefault(key, {})
            if ending in parts:
                raise UserError(
                    f"{path} has {name} twice: expected each key once in a shard; write the shard "
                    "again, with a key for each sample"
                )
            if parts and key != last:
                _note(notes, "apart", key)
            parts[ending] = (name, *place)
            last = key
        _check_end(content, tar.offset, path, name, notes)
    except (tarfile.TarError, ValueError, OverflowError) as e:  # Damaged headers raise all of them.
        raise UserError(
            f"{path} is damaged or was cut{f' after {name}' * bool(name)} ({e}): expected a whole "
            "tar file; copy or write it again"
        ) from None
    return members, dict(endings), notes


def _check_end(
    content: BinaryIO, offset: int, path: str, name: str, notes: dict[str, tuple[int, str]]
) -> None:
    """Raises `UserError` unless a shard ends where `tarfile` stopped, which reports no damage."""
    content.seek(offset)
    rest = content.read(_ENDED)
    if len(rest) < _BLOCK:
        if rest:
            raise tarfile.ReadError("a header is incomplete")
        _note(notes, "open", path)
    elif any(rest[:_BLOCK]):
        raise tarfile.ReadError(f"byte {offset:,} starts no header")
    elif any(rest):
        raise UserError(
            f"{path} has data after its end, which follows {name}: expected one tar file; several "
            "that were concatenated have to be separate files"
        )


class _Sample:
    """The members of one key, read when they are needed."""

    def __init__(self, content: BinaryIO, path: str, parts: Mapping[str, _Member]):
        self._content, self._path, self._parts = content, path, parts
        self._json: Any = None

    def find_label(self, choices: Sequence[str]) -> Any:
        """An integer, a text, a list of these, or None."""
        for choice in choices:
            ending, _, key = choice.partition(".")
            if ending == _JSON and key and _JSON in self._parts:
                value = look_up(self._read_json(), key)
                if value is None:
                    continue
                several = value if isinstance(value, list) else [value]
                for one in several:
                    if isinstance(one, bool) or not isinstance(one, int | str):
                        raise UserError(
                            f"{self._path}: {self._parts[_JSON][0]}: {key} is {shorten(value)}; "
                            "expected a class name, an integer, or a list of these"
                        )
                return value
            if choice in self._parts:
                content = self._read(choice, _MAX_LABEL)
                try:
                    text = content.decode("utf-8-sig").strip()
                except ValueError:
                    raise UserError(
                        f"{self._path}: {self._parts[choice][0]} has {shorten(content)}, which is "
                        "not UTF-8; expected a class name or an integer; write the shard again, "
                        "with labels in UTF-8"
                    ) from None
                if len(text.splitlines()) > 1 or "\0" in text:
                    raise UserError(
                        f"{self._path}: {self._parts[choice][0]} has {shorten(text)}; expected a "
                        "class name or an integer"
                    )
                return text or None
        return None

    def find_caption(self, choices: Sequence[str]) -> tuple[int, int]:
        """The place of the caption; the size is negative for one in a `.json`, zero for none."""
        for choice in choices:
            ending, _, key = choice.partition(".")
            if ending == _JSON and key and _JSON in self._parts:
                if look_up(self._read_json(), key) is not None:
                    _, start, size = self._parts[_JSON]
                    return start, -size
            elif choice in self._parts:
                return self._parts[choice][1:]
        return 0, 0

    def _read_json(self) -> Any:
        if self._json is None:
            try:
                self._json = parse_json(self._read(_JSON, MAX_TEXT))
            except ValueError as e:
                name = self._parts[_JSON][0]
                raise UserError(f"{self._path}: {name} is no JSON: {describe_error(e)}") from None
        return self._json

    def _read(self, ending: str, most: int) -> bytes:
        name, start, size = self._parts[ending]
        if size > most:
            raise UserError(f"{self._path}: {name} has {size:,} bytes; expected {most:,} at most")
        self._content.seek(start)
        return self._content.read(size)


def look_up(value: Any, key: str) -> Any:
    """The value of a key, or of `a.b` in objects of objects; None without one."""
    if not isinstance(value, dict):
        return None
    if key in value:
        return value[key]
    first, dot, rest = key.partition(".")
    return look_up(value.get(first), rest) if dot else None
