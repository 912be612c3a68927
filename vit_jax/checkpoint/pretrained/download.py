# SPDX-License-Identifier: Apache-2.0
"""Fetches published files into a cache, once.

A file gets its name only once it is complete. Until then it is `NAME.part`, which a later call
resumes. A file that was fetched before, or put in its place by hand, needs no network.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from vit_jax.checkpoint.pretrained.catalogue import (
    AUGREG_INDEX,
    Published,
    find,
    is_name,
    load_catalogue,
    needs_index,
    select_augreg,
    to_https,
)
from vit_jax.checkpoint.pretrained.hub import find_missing_repository, is_repository
from vit_jax.observe.console import log, log_lines
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.utils.errors import UserError, first_line
from vit_jax.utils.text import describe_size

_MIB = 2**20
_TIMEOUT = 60  # seconds without a byte


def resolve(name: str, *, cache_dir: Path | None = None) -> tuple[Path, Published] | None:
    """Returns the file and the description of a published checkpoint, downloading it if needed.

    Args:
      name: such as `augreg:B/16`; see `catalogue`.
      cache_dir: see `fetch`.

    Returns:
      `(path, published)`; None if `name` is an existing path, or has the form of a path or URL.

    Raises:
      UserError: no checkpoint has that name, or its file can't be downloaded.
    """
    if not is_name(name) or Path(name).exists():
        return None
    catalogue = load_catalogue()
    if needs_index(name):
        index = fetch(AUGREG_INDEX, cache_dir=cache_dir)
        published = select_augreg(index, name.partition(":")[2], catalogue=catalogue)
    else:
        published = find(name, catalogue=catalogue)
    return fetch(published, cache_dir=cache_dir), published


def find_missing(name: str) -> str | None:
    """Returns the URL that loading weights of this name would download; None if nothing.

    Raises:
      UserError: no checkpoint has that name.
    """
    if name.startswith(("https://", "http://")):
        return None if cache_path(name).is_file() else name
    if is_repository(name):
        return find_missing_repository(name)
    if not is_name(name) or Path(name).exists():
        return None
    if needs_index(name) and not cache_path(AUGREG_INDEX).is_file():
        return AUGREG_INDEX
    catalogue = load_catalogue()
    if needs_index(name):
        model = name.partition(":")[2]
        published = select_augreg(cache_path(AUGREG_INDEX), model, catalogue=catalogue)
    else:
        published = find(name, catalogue=catalogue)
    return None if cache_path(published).is_file() else published.url_https


def fetch(source: Published | str, *, cache_dir: Path | None = None) -> Path:
    """Returns the cached file of a checkpoint or URL, downloading it if needed.

    Args:
      source: a row of the catalogue, or an `https://` or `gs://` URL.
      cache_dir: folder of the cache; by default `$VIT_JAX_CACHE`, or else `~/.cache/vit_jax`.

    Raises:
      UserError: the file can't be downloaded, or differs from the published one.
    """
    path = cache_path(source, cache_dir=cache_dir)
    if isinstance(source, Published):
        wanted = _Wanted(path, source.url_https, source.size, source.sha256)
    else:
        wanted = _Wanted(path, to_https(source))
    if path.is_file():
        _check(path, wanted, remedy=f"delete {path} to have it fetched again")
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _own_part(path) as part:
            if part is None:
                return path
            log_lines([f"fetching {wanted.url}", f"      to {path}"])
            _download(part, wanted)
            try:
                _check(Path(part.name), wanted, remedy="it was deleted; try again")
            except UserError:
                os.unlink(part.name)
                raise
            os.replace(part.name, path)
    except OSError as e:  # From the disk: _download turns network errors into UserError.
        reason = e.strerror or str(e)
        raise UserError(f"can't write {path}: {reason}; set VIT_JAX_CACHE to another folder") from e
    log(f"wrote {path} ({describe_size(path.stat().st_size)})")
    return path


def cache_path(source: Published | str, *, cache_dir: Path | None = None) -> Path:
    """Returns where `fetch` stores a file: `CACHE/BUCKET/PATH`, or `CACHE/HOST/PATH`."""
    url = source.url_https if isinstance(source, Published) else to_https(source)
    parts = urlsplit(url)
    names = [name for name in unquote(parts.path).split("/") if name]
    if parts.scheme not in ("http", "https") or not names or {".", ".."} & {*names, parts.netloc}:
        raise UserError(f"{url!r}: expected the https:// or gs:// address of a file")
    if parts.netloc != "storage.googleapis.com":
        names.insert(0, parts.netloc.replace(":", "_"))
    default = os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax"
    return (cache_dir or Path(default).expanduser()).joinpath(*names)


def compute_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A file to fetch, with its path in the cache, and its size and checksum if known."""

    path: Path
    url: str
    size: int | None = None
    sha256: str = ""

    @property
    def by_hand(self) -> str:
        return f"fetch it on another machine and put it at {self.path}"


class _CutError(Exception):
    """The connection failed or ended too early."""


def _download(part: BinaryIO, wanted: _Wanted) -> None:
    """Completes the part, and resumes after each cut that left it longer than before.

    Raises:
      UserError: it can't be completed; the bytes that arrived stay in the part.
    """
    complete = False
    while not complete:
        offset = part.seek(0, os.SEEK_END)
        try:
            complete = _receive(part, offset, wanted)
        except _CutError as e:
            size = part.seek(0, os.SEEK_END)
            if size > offset:
                continue
            kept = f"; {describe_size(size)} are kept, try again to resume; or" if size else ";"
            raise UserError(f"can't fetch {wanted.url}: {e}{kept} {wanted.by_hand}") from e


def _receive(part: BinaryIO, offset: int, wanted: _Wanted) -> bool:
    """Appends what the server sends from `offset` on; False to request the file again from 0."""
    request = urllib.request.Request(wanted.url, headers={"User-Agent": "vit_jax"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as e:
        with e:
            if e.code == 416 and offset:  # The part is complete, or longer than the file.
                is_complete = e.headers.get("Content-Range") == f"bytes */{offset}"
                part.truncate(offset if is_complete else 0)
                return is_complete
            reason = f"HTTP {e.code} {e.reason}"
            raise UserError(f"can't fetch {wanted.url}: {reason}; {wanted.by_hand}") from None
    except (OSError, http.client.HTTPException) as e:
        raise _CutError(first_line(getattr(e, "reason", e))) from e
    with response:
        if response.headers.get_content_type() == "text/html":
            raise UserError(
                f"can't fetch {wanted.url}: got a web page instead, as networks send that want a "
                f"login; {wanted.by_hand}"
            )
        start, total = _range(response)
        if wanted.size is not None and total not in (None, wanted.size):
            raise UserError(
                f"{wanted.url} has {total} bytes, but {wanted.size} in the catalogue: it is not "
                "the published file"
            )
        if start != offset:
            part.truncate(0)  # The server ignores ranges.
            if start:
                return False
        with ProgressLog(
            wanted.path.name,
            total=None if total is None else total / _MIB,
            done=start / _MIB,
            unit="MiB",
            decimals=1,
        ) as progress:
            while chunk := _read(response):
                part.write(chunk)
                progress.advance(len(chunk) / _MIB)
        part.flush()
    size = part.tell()
    if total is not None and size < total:
        raise _CutError(f"cut after {size} of {total} bytes")
    return True


def _range(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Returns the offset of the body in the file, and the file's length if it is known."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status == 206 and match:
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_MIB)
    except (OSError, http.client.HTTPException) as e:
        raise _CutError(first_line(e)) from e


def _check(path: Path, wanted: _Wanted, *, remedy: str) -> None:
    """Raises `UserError` unless the size, checksum and format are those of the published file."""
    size = path.stat().st_size
    if wanted.size not in (None, size):
        raise UserError(f"{path} has {size} bytes, but {wanted.size} in the catalogue: {remedy}")
    with path.open("rb") as file:
        is_page = file.read(100).lstrip()[:1] == b"<"
    if is_page or (wanted.path.suffix == ".npz" and not zipfile.is_zipfile(path)):
        kind = "a web page" if is_page else f"{size} bytes that are not a whole .npz file"
        raise UserError(f"{path}, from {wanted.url}, is {kind}: {remedy}")
    if wanted.sha256 and (sha256 := compute_sha256(path)) != wanted.sha256:
        raise UserError(
            f"{path} has the SHA-256 {sha256}, but {wanted.sha256} in the catalogue: {remedy}"
        )


@contextlib.contextmanager
def _own_part(path: Path) -> Iterator[BinaryIO | None]:
    """Opens `NAME.part` for this process alone; None if another one has completed the file."""
    part = path.with_name(path.name + ".part")
    while True:
        with part.open("a+b") as file:
            is_locked = _lock(file, path)
            if path.is_file():
                part.unlink(missing_ok=True)
                yield None
                return
            if not is_locked:
                break
            if not _is_at(file, part):
                continue  # Who had the lock before has removed this file.
            try:
                yield file
            finally:
                if _is_at(file, part) and not os.fstat(file.fileno()).st_size:
                    part.unlink()
            return
    # A file system without locks: each process has its own part, which no other resumes.
    part.unlink(missing_ok=True)
    own = part.with_name(f"{part.name}.{uuid.uuid4().hex}")
    try:
        with own.open("a+b") as file:
            yield file
    finally:
        own.unlink(missing_ok=True)


def _lock(file: BinaryIO, path: Path) -> bool:
    """Waits until this process alone has the file; False where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log(f"waiting for the process that fetches {path}")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
