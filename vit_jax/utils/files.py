# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vit_jax.utils.errors import UserError


@contextlib.contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside a file, which becomes the file when the block ends well.

    Raises:
      UserError: the file exists, or can't be written.
    """
    if path.exists():
        raise UserError(f"--output={path} exists; remove it, or choose another name")
    fresh = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        os.replace(fresh, path)
    except OSError as e:
        raise UserError(f"--output={path} can't be written: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):  # Nothing is there where a folder could not be made.
            fresh.unlink()


@contextlib.contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Gives a folder under a temporary name, which becomes `path` when the block ends well.

    Raises:
      UserError: there is something of that name, or it can't be written.
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
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
