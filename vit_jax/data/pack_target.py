# SPDX-License-Identifier: Apache-2.0
"""Where a pack is written: a folder, or a bucket by way of a temporary folder.

A file for a bucket is written to the temporary folder, sent whole, and read back. The labels of a
shard are sent after its images, and `pack.json` after all shards, so that a pack which is not
complete is never read. What was sent is not sent again, whichever machine resumes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from vit_jax.data.sources.packed import MANIFEST
from vit_jax.data.sources.ranges import be_patient
from vit_jax.utils.buckets import EXPECTED, SCHEMES, Bucket, is_url
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import private_folder
from vit_jax.utils.text import describe_size, name_in_texts

# Bytes of an object: S3 takes 5 GiB in one request, and objects are held in memory.
MAX_OBJECT = 2**32
T = TypeVar("T")


class BucketError(Exception):
    """A bucket does not answer; the message is one line, and a later try may succeed."""


class Target:
    """A folder that a pack is written to.

    Attributes:
      home: the folder that `folder` is in or is.
      folder: where files are written.
      place: the folder or the URL that the pack is read from.
      remote: whether that is a URL.
    """

    remote = False

    def __init__(self, folder: Path):
        self.home = self.folder = folder
        self.place = str(folder)

    def names(self) -> set[str]:
        """The names of all files that are there; raises OSError."""
        return set(os.listdir(self.folder))

    def fetch(self, names: Iterable[str]) -> None:
        """Makes `folder` have these files."""

    def send(self, name: str) -> None:
        """Sends a file from `folder` to where the pack is read from, and verifies it there."""

    def drop(self, *names: str) -> None:
        """Removes files from `folder` that are elsewhere."""

    def remove(self, name: str) -> None:
        """Removes a file."""
        (self.folder / name).unlink(missing_ok=True)


class BucketTarget(Target):
    """A pack in a bucket. All methods raise `UserError`, and `BucketError` without an answer.

    Args:
      bucket: which holds nothing but the pack.
      home: the temporary folder.
    """

    remote = True

    def __init__(self, bucket: Bucket, home: Path):
        super().__init__(home / bucket.name / bucket.path)
        self.folder.mkdir(parents=True)
        # Lines that are printed name the object in place of the file.
        name_in_texts(str(self.folder), bucket.url)
        self._bucket, self.home, self.place = bucket, home, bucket.url
        self._known = MANIFEST  # an object that a listing has to have if it exists
        _ask(self._bucket.list, patient=False)  # At the start nothing is waited for.

    def names(self) -> set[str]:
        found = set(_ask(self._bucket.list))
        if self._known not in found and self._read(self._known) is not None:
            # Google Cloud Storage answers a listing that is refused with no names.
            raise UserError(
                f"DST: {self.place}: the credentials permit reading objects, and not listing them"
            )
        return found

    def fetch(self, names: Iterable[str]) -> None:
        wanted = [(name, self.folder / name, 0) for name in names]
        _ask(lambda: self._bucket.download(wanted))

    def send(self, name: str) -> None:
        path = self.folder / name
        if (size := path.stat().st_size) > MAX_OBJECT:
            raise UserError(
                f"{self.place}/{name} would have {describe_size(size)}; expected at most "
                f"{describe_size(MAX_OBJECT)} for an object in a bucket: choose a smaller "
                "--shard_size and another DST"
            )
        _ask(functools.partial(self._write, name, path.read_bytes()))
        self._known = name

    def _write(self, name: str, content: bytes) -> None:
        self._bucket.write(name, content)
        there, _ = self._bucket.read(name)
        if there != content:
            raise OSError(
                errno.EIO,
                f"{self.place}/{name} is {_describe(there)} after {_describe(content)} were sent",
            )

    def _read(self, name: str) -> bytes | None:
        return _ask(lambda: self._bucket.read(name))[0]

    def drop(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        super().remove(name)
        _ask(lambda: self._bucket.write(name, None))


def _describe(content: bytes | None) -> str:
    if content is None:
        return "missing"
    return f"{len(content):,} bytes with CRC-32 {zlib.crc32(content):08x}"


def _ask(work: Callable[[], T], *, patient: bool = True) -> T:
    """The result of requests; raises `UserError` or `BucketError` if there is none."""
    try:
        return be_patient(work) if patient else work()
    except OSError as e:
        text = f"DST: {e.strerror or e}"
        if e.errno == errno.EIO:
            raise BucketError(text) from None
        raise UserError(text) from None


@contextlib.contextmanager
def open_target(dst: str, *, temporary: str | None) -> Iterator[Target]:
    """Yields the target of the arguments DST and --temporary.

    Raises:
      UserError: DST is no folder or bucket, or can't be read; or the temporary folder can't be
        made.
      BucketError: the bucket does not answer.
    """
    if not is_url(dst):
        if temporary is not None:
            raise UserError(f"--temporary={temporary}: expected DST in a bucket; a folder has none")
        yield Target(Path(dst).expanduser().absolute())
        return
    if not dst.startswith(SCHEMES):
        raise UserError(f"DST={dst!r}: expected a folder, {EXPECTED}")
    try:
        bucket = Bucket(dst)
    except UserError as e:
        raise UserError(f"DST={e}") from None
    home = _make_temporary(temporary)
    try:
        yield BucketTarget(bucket, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _make_temporary(temporary: str | None) -> Path:
    """Makes a temporary folder in `temporary`, by default below the cache; raises `UserError`."""
    if temporary is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit_jax"
    else:
        cache = Path(temporary).expanduser().absolute()
    try:
        return private_folder(cache / "packs")
    except OSError as e:
        raise UserError(
            f"{cache} can't be written ({e.strerror}), where the files of a pack in a bucket are "
            "written first; expected another folder as --temporary"
        ) from None
