# SPDX-License-Identifier: Apache-2.0
"""Keeps compiled programs on disk, so that a run that resumes does not compile again."""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from vit_jax.utils.errors import UserError
from vit_jax.utils.files import check_writable

_EVENTS = {
    "/jax/compilation_cache/cache_hits": "hits",
    "/jax/compilation_cache/cache_misses": "misses",
}
_EXPECTED = "expected a folder to write to, or off"
_counts: Counter[str] = Counter()
# The warnings of JAX, which compiles the program in any case.
_FAILURE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)", re.DOTALL
)


def set_up(folder: str | None) -> None:
    """Enables the cache, before anything is compiled.

    Args:
      folder: on a local or a shared disk; `off` for no cache. None for the value of
        `JAX_COMPILATION_CACHE_DIR` or else a folder below `XDG_CACHE_HOME` or `~/.cache`.

    Raises:
      UserError: the folder is not writable.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        path = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    else:
        path = Path(folder) if folder else _default()
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
        writable = os.path.isdir(path) and os.access(path, os.W_OK)
        if not writable and folder is None:  # A machine without a home still trains.
            return
        if not writable:
            raise UserError(f"--compile_cache={folder}: {_EXPECTED}")
        jax.config.update("jax_compilation_cache_dir", str(path))
    _log_failures(path)
    jax.monitoring.register_event_listener(_count)


def check(folder: str | None) -> None:
    """Raises `UserError` if `set_up` would, and writes nothing."""
    try:
        if folder not in (None, "off"):
            check_writable(Path(folder))
    except OSError:
        raise UserError(f"--compile_cache={folder}: {_EXPECTED}") from None


def _log_failures(folder: Path) -> None:
    """Logs entries that can't be read or written, in place of the warnings of JAX."""
    show = warnings.showwarning

    @functools.cache
    def report(what: str) -> None:
        logging.getLogger("vit_jax").warning(
            "compile cache: an entry of %s can't be %s: the program is compiled", folder, what
        )

    def show_or_log(message: Any, *args: Any, **options: Any) -> None:
        found = _FAILURE.fullmatch(str(message))
        if found is None:
            show(message, *args, **options)
            return
        reading = found[1] == "reading"
        report(f"read ({found[3][:200]})" if reading else f"written ({found[3][:200]})")
        if not reading:  # JAX never replaces half an entry, and fails to read it at each start.
            with contextlib.suppress(OSError, ValueError):
                entries = folder.glob(f"{found[2]}-*-cache")
                max(entries, key=lambda path: path.stat().st_mtime).unlink()

    warnings.showwarning = show_or_log


def summary() -> str:
    """Hits and misses, such as `, compile cache: 3 hits, 1 miss`; empty if there are none."""
    if not _counts:
        return ""
    hits, misses = _counts["hits"], _counts["misses"]
    return f", compile cache: {hits} hit{'s' * (hits != 1)}, {misses} miss{'es' * (misses != 1)}"


def _default() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # A program compiled for this CPU may not run on another one with the same home folder.
    cpu = Path("/proc/cpuinfo")
    flags = platform.machine()
    if cpu.exists():
        lines = cpu.read_text(errors="replace").splitlines()
        flags += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return Path(home) / "vit_jax" / f"compiled-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def _count(event: str, **_: object) -> None:
    if event in _EVENTS:
        _counts[_EVENTS[event]] += 1
