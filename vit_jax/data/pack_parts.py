# SPDX-License-Identifier: Apache-2.0
"""Packing as a job of many parts: the records of the parts, and the check before they are joined.

Part k of n takes the k-th of n runs of shards of equal length, so what it packs depends on no other
part. `DST/part-00003-of-00064.json` is written when a part starts: it has the manifest that all
parts must agree on, and is locked as long as the part runs. A part is complete once each of its
shards has its `.npz`.
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vit_jax.data.sources.packed import Manifest, as_manifest, select_part
from vit_jax.utils.bounds import MAX_JSON, open_outside, parse_json, shorten
from vit_jax.utils.errors import UserError

# Indices of an array job of Slurm or of a Job of Kubernetes.
_MAX_PARTS = 2**16
_FILE = re.compile(r"part-(\d{5})-of-(\d{5})\.json")
# A file system that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, order=True)
class Part:
    """Part `number` of `count`, from 0."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def file(self) -> str:
        """The name of its record."""
        return f"part-{self.number:05}-of-{self.count:05}.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """What the parts of a job must agree on.

    Attributes:
      manifest: of the whole.
      fingerprints: of the source's splits; see `data.fingerprint`.
    """

    manifest: Manifest
    fingerprints: Mapping[str, str]

    def encode(self) -> bytes:
        """The content of its file."""
        return f"{json.dumps(dataclasses.asdict(self), indent=2)}\n".encode()

    def check(self, other: "Record", *, own: str, its: str) -> None:
        """Raises `UserError` if another part is of other data or settings; texts name the two."""
        check_fields(other.manifest, self.manifest, f"{own} and {its} are not of one pack:")
        for split, found in self.fingerprints.items():
            if other.fingerprints.get(split) != found:
                raise UserError(
                    f"{own} and {its} are not of one pack: the records of {shorten(split)} have "
                    "changed between them: choose another folder, or delete it"
                )


def parse_part(text: str) -> Part:
    """Parses `3/64`; raises `UserError`."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None:
        raise UserError(f"--part={shorten(text)}: expected NUMBER/COUNT, such as 0/64 to 63/64")
    part = Part(int(match[1]), int(match[2]))
    if not 1 <= part.count <= _MAX_PARTS:
        raise UserError(f"--part={text}: expected 1 to {_MAX_PARTS:,} parts")
    if part.number >= part.count:
        raise UserError(
            f"--part={text}: expected 0/{part.count} to {part.count - 1}/{part.count}, since parts "
            "count from 0"
        )
    return part


def check_fields(there: Manifest, here: Manifest | Mapping[str, Any], where: str) -> None:
    """Raises `UserError` if a manifest differs from another one, or from some values."""
    values = dataclasses.asdict(here) if isinstance(here, Manifest) else here
    for name, new in values.items():
        old = getattr(there, name)
        if old != new:
            raise UserError(
                f"{where} {name}={str(old)[:80]!r} there, and {str(new)[:80]!r} here: choose "
                "another folder, or delete it"
            )


def list_parts(folder: Path) -> list[Part]:
    """The parts that have records in a folder, sorted; raises OSError."""
    matches = map(_FILE.fullmatch, os.listdir(folder))
    return sorted(Part(int(match[1]), int(match[2])) for match in matches if match)


def list_part_files(names: Iterable[str]) -> list[str]:
    """Those of some names that are records of parts."""
    return [name for name in names if _FILE.fullmatch(name)]


@contextlib.contextmanager
def claim(folder: Path, part: Part, record: Record) -> Iterator[None]:
    """Writes the record of a part, and holds its lock.

    Raises:
      UserError: another process has this part, or the folder has parts of another job.
      OSError: the record can't be written.
    """
    for other in list_parts(folder):
        if other.count != part.count:
            raise UserError(
                f"DST={str(folder)!r} has part {other} of another job: expected parts of "
                f"{part.count}; choose another folder, or delete it"
            )
        # One is enough: it has been compared itself.
        if other != part and (found := _read(folder / other.file)) is not None:
            record.check(found, own=f"--part={part}", its=f"part {other} in DST={str(folder)!r}")
            break
    path = folder / part.file
    # It is written in place, since a file that replaces another one has another lock.
    with open(path, "a+b") as file:
        what = f"part {part} " if part.count > 1 else ""
        lock(file, busy=f"DST={str(folder)!r}: another process is packing {what}there")
        if (found := _read(path)) is None:
            file.truncate(0)
            file.write(record.encode())
            file.flush()
            os.fsync(file.fileno())
        else:
            own = f"--part={part}" if part.count > 1 else "this command"
            record.check(found, own=own, its=f"what was begun in DST={str(folder)!r}")
        yield


def lock(file: BinaryIO, *, busy: str) -> None:
    """Locks a file that is open for writing, which NFS asks for.

    Raises `UserError` with the text `busy` if another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(busy) from None
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s can't be locked (%s): make sure that no other process packs the same", file.name,
            e.strerror,
        )  # fmt: skip


def _read(path: Path) -> Record | None:
    """The record of a part; None if it was killed before it had written it.

    Raises OSError, and `UserError` if the record is not as it was written.
    """
    with open_outside(path, max_bytes=MAX_JSON) as file:
        content = file.read()
    if not content.endswith(b"}\n"):
        return None
    try:
        values = parse_json(content)
        fingerprints = {str(key): str(value) for key, value in values["fingerprints"].items()}
        return Record(as_manifest(values["manifest"]), fingerprints)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} can't be read: {e}; delete it, and run its part again") from None


def check_parts(folder: Path, there: Collection[str]) -> Record:
    """Checks that all parts are there, of one pack and complete, and returns what they agree on.

    Args:
      folder: has the records.
      there: the names of all files of the parts.

    Raises:
      UserError: parts are missing, incomplete or of different packs.
      OSError: the folder can't be read.
    """
    parts, where = list_parts(folder), f"DST={str(folder)!r}"
    if not parts:
        raise UserError(f"{where} has no parts: run --part=0/N to --part=N-1/N first")
    counts = sorted({part.count for part in parts})
    if len(counts) > 1:
        raise UserError(
            f"{where} has parts of jobs of {' and '.join(map(str, counts))} parts: expected one; "
            "choose another folder, or delete it"
        )
    records = [(part, _read(folder / part.file)) for part in parts]
    found = {part.number: record for part, record in records if record is not None}
    absent = set(range(counts[0])) - found.keys()
    first, record = next(iter(found.items()), (0, None))
    if record is not None:
        for number, other in found.items():
            record.check(other, own=f"part {first} in {where}", its=f"part {number}")
        shards = record.manifest.shards()
        for number in found:
            own = select_part(shards, number, counts[0])
            if any(f"{shard.name}.npz" not in there for shard in own):
                absent.add(number)
    if absent or record is None:
        least = min(absent, default=0)
        raise UserError(
            f"{where}: {len(absent)} of {counts[0]} parts are not complete: {_join(absent)}; run "
            f"the command of each again, such as --part={least}/{counts[0]}"
        )
    return record


def _join(numbers: Iterable[int]) -> str:
    """Returns numbers as `1, 3-5`; at most 20 of such runs are named."""
    groups = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    more = [f"and {len(texts) - 20} more runs"] if len(texts) > 20 else []
    return ", ".join(texts[:20] + more)
