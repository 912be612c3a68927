# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a workdir has; needs neither JAX nor Orbax."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vit_jax.checkpoint.manifest import find_fault
from vit_jax.observe.console import log
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import CHECKPOINTS
from vit_jax.utils.mirrors import fetch_checkpoint
from vit_jax.utils.suggestions import suggest_workdir

_STEP = re.compile("0|[1-9][0-9]{0,17}")


def list_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a workdir, in ascending order.

    Raises:
      UserError: the folder of the checkpoints can't be read, or is none.
    """
    folder = workdir / CHECKPOINTS
    # Without this, they would count as none, and a run would start from scratch.
    if folder.is_symlink() and not folder.exists():
        raise UserError(
            f"{folder} is a link to {os.readlink(folder)}, which does not exist; expected the "
            "folder of the checkpoints: is a disk not mounted?"
        )
    return _steps_in(folder)


def find_checkpoint(folder: Path, *, items: Sequence[str] | None = None) -> Path:
    """Returns the folder of the newest checkpoint that is not damaged.

    Args:
      folder: a workdir, a folder of checkpoints, or one checkpoint, which is returned as it is.
      items: the parts of a checkpoint that must not be damaged, such as `params`; None for all.
        Newer checkpoints that are skipped are logged. If all are damaged, the newest is returned.

    Raises:
      UserError: the folder has no checkpoint.
    """
    is_workdir = os.path.lexists(folder / CHECKPOINTS)
    parent = folder / CHECKPOINTS if is_workdir else folder
    steps = list_steps(folder) if is_workdir else _steps_in(folder)
    paths = [(parent / str(step)).absolute() for step in reversed(steps)]
    skipped = []
    for path in paths:
        if (fault := find_fault(path, items)) is None:
            for line in skipped:
                log(line)
            return path
        skipped.append(f"skipped {path}, which is damaged: {fault}")
    if paths:
        return paths[0]
    fetch_checkpoint(folder, items)
    if any(os.path.exists(folder / name) for name in ("params", "_METADATA")):
        return folder.absolute()
    raise UserError(
        f"{str(folder)!r} has no checkpoint; expected the workdir of a run, or a checkpoint"
        f"{suggest_workdir(folder)}"
    )


def _steps_in(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(
            f"{folder} can't be read ({e.strerror}); expected a folder of checkpoints"
        ) from None
    for name in sorted(names):
        if name.isdecimal() and not is_step(name):
            _log_once(
                f"{folder / name} is skipped: its name is not that of a checkpoint; expected the "
                "number of its step, such as 20"
            )
    # Checkpoints that are being written or removed have other names.
    return sorted(int(name) for name in names if is_step(name))


def is_step(name: str) -> bool:
    """Whether a name is that of a checkpoint: the number of a step, as a run writes it."""
    return _STEP.fullmatch(name) is not None


@functools.cache
def _log_once(text: str) -> None:
    log(text)
