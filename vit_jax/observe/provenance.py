# SPDX-License-Identifier: Apache-2.0
"""Describes the origin of a checkpoint: config, versions, source, devices and data."""

import importlib.metadata
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import vit_jax
from vit_jax.observe.console import log

_QUIET: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10}
_MACHINE = ("git", "devices", "processes")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")


def describe_run(config: Mapping[str, Any], *, data: str) -> dict[str, Any]:
    """Returns the origin of a run as JSON values; `data` is the fingerprint of its data."""
    return {
        "config": dict(config),
        "versions": {"vit_jax": vit_jax.__version__, "python": platform.python_version()}
        | {name: find_version(name) for name in _PACKAGES},
        "git": describe_git(Path(vit_jax.__file__).parent),
        "devices": dict(Counter(d.device_kind for d in jax.devices())),
        "processes": jax.process_count(),
        "data": data,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_git(folder: Path) -> str | None:
    """Returns the commit of a folder, with `-dirty` if files were changed; None without git."""
    try:
        command = ["git", "-C", str(folder)]
        subprocess.run([*command, "ls-files", "--error-unmatch", "."], check=True, **_QUIET)
        commit = subprocess.run([*command, "rev-parse", "HEAD"], check=True, **_QUIET).stdout
        changed = subprocess.run([*command, "diff", "--quiet", "HEAD", "--", "."], **_QUIET)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + "-dirty" * bool(changed.returncode)


def log_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Logs changes since a checkpoint was written that may change the last digits."""
    old, new = dict(before.get("versions") or {}), dict(now["versions"])
    pairs = [(name, old[name], new[name]) for name in new if name in old]
    pairs += [(key, before[key], now[key]) for key in _MACHINE if key in before]
    for name, was, is_ in pairs:
        if was != is_:
            log(f"changed since the checkpoint: {name}: {was} before, {is_} now")


def find_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
