# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: one experiment each, told apart by `config.json`."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from vit_jax.checkpoint import manager
from vit_jax.observe.console import say
from vit_jax.observe.writer import METRICS
from vit_jax.utils.errors import UserError

CONFIG = "config.json"

# What may change between two runs in one workdir: how long, where, how often and from what, but not
# what is trained.
_FREE = (
    "total_steps",
    "epochs",
    "mesh",
    "adapt",
    "checkpoint",
    "evals",
    "log_every",
    "profile",
)
_FREE_KEYS = ("init_from", "data.data_dir", "data.num_threads")


def open_workdir(path: str, config: dict[str, Any]) -> Path:
    """Makes a workdir, or checks that one that exists is of this experiment.

    Args:
      path: a local or shared folder.
      config: the resolved config.

    Raises:
      UserError: it can't be written to, or belongs to another experiment or program.
    """
    if "://" in path:
        raise UserError(f"--workdir={path!r}: expected a folder; mount a bucket to use it as one")
    workdir = Path(path)
    file = workdir / CONFIG
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
        previous = json.loads(file.read_text()) if file.exists() else None
        if not isinstance(previous, dict | None):
            raise ValueError(f"{file} holds no config")
    except (OSError, ValueError) as e:
        raise UserError(f"--workdir={path!r} can't be used: {type(e).__name__}: {e}") from None
    if previous is not None:
        _compare(path, _flatten(previous), _flatten(config))
    else:
        checkpoints = workdir / manager.FOLDER
        if (workdir / METRICS).exists() or (checkpoints.exists() and any(checkpoints.iterdir())):
            raise UserError(
                f"--workdir={path!r} holds metrics or checkpoints but no {CONFIG}: it is not a "
                "workdir of vit_jax; choose another"
            )
    return workdir


def write_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes `config.json`, whole or not at all."""
    file = workdir / CONFIG
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    os.replace(fresh, file)
    say(f"wrote {file}")


def _compare(path: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    if added := [f"{key}={new[key]!r}" for key in sorted(new.keys() - old.keys())]:
        # A later version of the package has more keys; their defaults are what was there before.
        say(f"config keys that the run was started without: {', '.join(added)}")
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or key not in old:
            continue
        if key.split(".")[0] not in _FREE and key not in _FREE_KEYS:
            raise UserError(
                f"--workdir={path!r} belongs to another experiment: config.{key} is {before!r} "
                f"there and {after!r} here; choose another workdir, or the same value"
            )
        say(f"config.{key}: {before!r} before, {after!r} now")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))  # pairs as lists, as they come back
    return flat
