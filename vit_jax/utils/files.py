# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear under their name only once they are complete, and patterns."""

import contextlib
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vit_jax.utils.errors import UserError
from vit_jax.utils.text import encode_text

# The locked files of `private_folder`, which are open until the process ends.
_held: list[Any] = []


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which replaces `path` if the block succeeds.

    If the block raises, the temporary file is removed, and `path` is as it was before. Processes
    that write the same file have a temporary file each, `NAME.RANDOM.tmp`, which they lock; those
    that are not locked are of processes that were killed, and are removed.

    Args:
      path: of the file.
      sync: whether the content must be on the disk before the file gets its name.

    Raises:
      OSError: the file can't be replaced.
    """
    _remove_abandoned(path)
    temporary, held = _create_locked(path)
    try:
        with held:
            yield temporary
            if sync:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # It has its final name.
            temporary.unlink()


def _create_locked(path: Path) -> tuple[Path, IO[bytes]]:
    """Makes an empty temporary file for `path`; returns its path, and what holds its lock."""
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not temporary.exists()
        except BlockingIOError:
            taken = True
        except OSError:  # The file system has no locks.
            taken = False
        if not taken:
            return temporary, file
        file.close()  # Another process took it for abandoned before it was locked, and removes it.


def _remove_abandoned(path: Path) -> None:
    """Removes temporary files of `path` that no process has locked."""
    is_own = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.tmp").fullmatch
    with contextlib.suppress(OSError):
        for name in filter(is_own, os.listdir(path.parent)):
            with contextlib.suppress(OSError), open(path.with_name(name), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.with_name(name).unlink()


def private_folder(parent: Path) -> Path:
    """Makes a folder for this process, and removes those of processes that were killed.

    Args:
      parent: has nothing but such folders.

    Raises:
      OSError: it can't be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.iterdir():
        with contextlib.suppress(OSError), open(other / ".used") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)
    home = Path(tempfile.mkdtemp(dir=parent))
    _held.append(open(home / ".used", "w"))  # noqa: SIM115 (held until the process ends)
    fcntl.flock(_held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    return home


def write_atomically(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Writes a file, and its folder if there is none; see `atomic_file`.

    Text becomes UTF-8; what has none is written by `encode_text`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, sync=sync) as temporary:
        temporary.write_bytes(encode_text(content) if isinstance(content, str) else content)


def check_writable(folder: Path) -> None:
    """Raises `OSError` if a folder can't be written to, or can't be made where there is none."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        code = errno.EEXIST if there == folder else errno.ENOTDIR
    elif not os.access(there, os.W_OK | os.X_OK):
        code = errno.EACCES
    else:
        return
    raise OSError(code, os.strerror(code), str(folder))


def check_fresh(path: Path, *, key: str = "--output") -> None:
    """Raises `UserError` if a path that is to be written exists; `key` is its option."""
    if path.exists():
        raise UserError(f"{key}={path} exists; remove it, or choose another name")


@contextlib.contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path for `--output`, which gets its name if the block succeeds.

    Raises:
      UserError: the file exists, or can't be written.
    """
    check_fresh(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            yield temporary
    except OSError as e:
        raise UserError(f"--output={path} can't be written: {e.strerror or e}") from e


@contextlib.contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder for `--output`, which gets its name if the block succeeds.

    Errors in the block that name a file of the temporary folder name it in `path` instead.

    Raises:
      UserError: the folder exists, or can't be written.
    """
    fresh = path.with_name(f"{path.name}.tmp")
    for taken in (path, fresh):
        if taken.exists():
            raise UserError(f"--output={path}: {taken} exists; remove it, or choose another name")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        os.rename(fresh, path)
    except OSError as e:
        raise UserError(f"--output={path} can't be written: {e.strerror or e}") from e
    except UserError as e:
        # The user knows the folder by the name that it does not have yet.
        raise UserError(str(e).replace(str(fresh), str(path))) from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def find_paths(pattern: str) -> list[str]:
    """Returns the files and folders that match a pattern such as `data/**/*.png`, sorted.

    The part of the pattern that exists under this very name is none: folders may have `[`, `?` and
    `*` in their names.
    """
    there = pattern
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    rest = pattern[len(there) :]
    return sorted(glob.glob(glob.escape(there) + rest, recursive=True))
