# SPDX-License-Identifier: Apache-2.0
"""Checksums of a checkpoint: `STEP/manifest.json` has the size and CRC-32 of each of its files.

It is written after all other files, and before the folder gets its final name.
"""

import concurrent.futures
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.utils.bounds import (
    MAX_WEIGHTS,
    check_tree,
    is_inside,
    open_outside,
    read_json,
    shorten,
)
from vit_jax.utils.layout import MANIFEST, RUN
from vit_jax.utils.mirrors import fetch_checkpoint

_CHUNK = 1 << 22
_MAX_MANIFEST = 2**28  # bytes, for a million files
_THREADS = 32
# Files without which no checkpoint of a run can be read.
_ESSENTIAL = tuple(
    f"{item}/{name}" for item in ("params", "training") for name in ("_METADATA", "manifest.ocdbt")
)


def write_manifest(folder: Path, *, others: Mapping[str, list[Any]] | None = None) -> None:
    """Writes the manifest of a folder, and flushes all of its files to the disk.

    Args:
      folder: of the checkpoint.
      others: sizes and checksums of files that other processes have, by name.
    """
    content = {"algorithm": "crc32", "files": dict(others or {}) | measure_files(folder)}
    file = folder / MANIFEST
    with open(file, "w") as f:
        json.dump(content | {"crc32": checksum_of(content)}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(sync_folder, [folder, *(p for p in folder.rglob("*") if p.is_dir())]))


def measure_files(folder: Path) -> dict[str, list[Any]]:
    """Returns the size and checksum of each file of a folder, and flushes it to the disk."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda path: _measure(path, sync=True), paths)
        return {p.relative_to(folder).as_posix(): s for p, s in zip(paths, sums, strict=True)}


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def has_manifest(folder: Path) -> bool:
    """Whether a checkpoint can be verified; one of an older version of the package can't."""
    return (folder / MANIFEST).exists() or (folder / RUN).exists()


def find_fault(folder: Path, items: Sequence[str] | None = None) -> str | None:
    """Returns the first fault of a checkpoint, as `FILE is ...`; None if it is not damaged.

    Every byte is read. Without a manifest, only the existence of the main files is checked. In the
    local copy of a bucket, this downloads the files.

    Args:
      folder: of the checkpoint.
      items: the parts to verify, such as `params`; None for all.

    Raises:
      UserError: the bucket can't be read, which is no fault of the checkpoint.
    """
    fetch_checkpoint(folder, items)
    try:
        os.listdir(folder)
        verifiable = has_manifest(folder)
    except OSError as e:
        return f"it can't be read ({e.strerror})"
    if not verifiable:
        missing = (name for name in _ESSENTIAL if not os.path.exists(folder / name))
        wanted = (name for name in missing if items is None or name.partition("/")[0] in items)
        return next((f"{name} is missing" for name in wanted), None) or _find_strange(folder)
    try:
        content = read_json(folder / MANIFEST, max_bytes=_MAX_MANIFEST)
        checksum = content.pop("crc32")
        files: dict[str, list[Any]] = content["files"]
        if checksum != checksum_of(content):
            return f"{MANIFEST} has changed since it was written"
        # Whoever can write the files can write the checksum.
        for name, entry in files.items():
            if not is_inside(name) or not _is_entry(entry):
                return f"{MANIFEST} has {shorten(name)}: {shorten(entry)}, which is not one of "
                "its files"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as e:
        return f"{MANIFEST} can't be read ({e.strerror})"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        return f"{MANIFEST} can't be read ({type(e).__name__})"
    if strange := _find_strange(folder):
        return strange
    wanted = {
        name: was for name, was in files.items() if items is None or name.partition("/")[0] in items
    }
    return find_fault_in(folder, wanted)


def read_files(folder: Path) -> dict[str, list[Any]]:
    """Returns sizes and checksums by name from the manifest of a checkpoint without a fault."""
    return read_json(folder / MANIFEST, max_bytes=_MAX_MANIFEST)["files"]


def find_fault_in(folder: Path, files: Mapping[str, list[Any]]) -> str | None:
    """Returns the first fault of some files, given their sizes and checksums; None without one."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _compare(folder, name, files[name]), files)
        return next((fault for fault in found if fault is not None), None)


def _find_strange(folder: Path) -> str | None:
    """Finds what would block or fill the memory of the library that reads the checkpoint."""
    try:
        check_tree(folder)
    except OSError as e:
        return f"{e.filename} can't be read ({e.strerror})"
    return None


def _is_entry(entry: Any) -> bool:
    """Whether a value of the manifest is the size and the checksum of a file."""
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and type(entry[0]) is int
        and 0 <= entry[0] <= MAX_WEIGHTS
        and isinstance(entry[1], str)
    )


def _compare(folder: Path, name: str, was: list[Any]) -> str | None:
    try:
        size = (folder / name).stat().st_size
        if size != was[0]:
            return f"{name} is {size:,} bytes long, not {was[0]:,}"
        if _measure(folder / name) != was:
            return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as e:
        return f"{name} can't be read ({e.strerror})"
    return None


def _measure(path: Path, *, sync: bool = False) -> list[Any]:
    """Returns the size in bytes and the checksum of a file."""
    size = checksum = 0
    with open_outside(path, max_bytes=MAX_WEIGHTS) as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
        if sync:
            os.fsync(file.fileno())
    return [size, f"{checksum:08x}"]


def checksum_of(content: dict[str, Any]) -> str:
    """Returns the CRC-32 that a manifest states for the rest of its content."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
