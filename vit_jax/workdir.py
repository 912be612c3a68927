# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: one experiment each, told apart by `config.json`."""

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax.checkpoint import manager
from vit_jax.observe.console import say
from vit_jax.observe.writer import METRICS
from vit_jax.utils.errors import UserError

CONFIG = "config.json"
LABELS = "labels.txt"

# What may change between two runs in one workdir: how long, where, how often and from what, but not
# what is trained.
_FREE = (
    "total_steps",
    "epochs",
    "examples",
    "mesh",
    "adapt",
    "checkpoint",
    "evals",
    "log_every",
    "log_every_epochs",
    "log_every_examples",
    "log_every_percent",
    "profile",
)
_FREE_KEYS = (
    "init_from",
    "data.data_dir",
    "data.num_threads",
    "data.max_corrupt",
    "data.max_ram_gb",
)


def open_workdir(
    path: str, config: dict[str, Any], class_names: tuple[str, ...] | None = None
) -> Path:
    """Makes a workdir, or checks that one that exists is of this experiment.

    Args:
      path: a local or shared folder.
      config: the resolved config.
      class_names: by label, where the data knows them.

    Raises:
      UserError: it can't be written to, belongs to another experiment or program, or was trained
        with other class names.
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
        labels = workdir / LABELS
        old_names = labels.read_text(encoding="utf-8").split("\n")[:-1] if labels.exists() else None
        if not isinstance(previous, dict | None):
            raise ValueError(f"{file} holds no config")
    except (OSError, ValueError) as e:
        raise UserError(f"--workdir={path!r} can't be used: {type(e).__name__}: {e}") from None
    if previous is not None:
        _compare(path, _flatten(previous), _flatten(config))
        if class_names is not None and old_names is not None:
            _compare_labels(path, old_names, class_names)
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


def write_labels(workdir: Path, class_names: tuple[str, ...] | None) -> None:
    """Writes `labels.txt`, a class name a line, if they are known and it is not there."""
    file = workdir / LABELS
    if class_names is None or file.exists():
        return
    fresh = file.with_suffix(".tmp")
    fresh.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    os.replace(fresh, file)
    say(f"wrote {file}: {len(class_names)} class names")


def _compare_labels(path: str, old: Sequence[str], new: Sequence[str]) -> None:
    for label, (before, now) in enumerate(itertools.zip_longest(old, new)):
        if before != now:
            raise UserError(
                f"--workdir={path!r}: {LABELS} has {len(old)} classes, the data {len(new)}; label "
                f"{label} is {before!r} there and {now!r} here: expected the same, or another "
                "workdir"
            )


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
