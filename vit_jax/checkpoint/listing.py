# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a workdir has; needs neither JAX nor Orbax."""

from collections.abc import Sequence
from pathlib import Path

from vit_jax.checkpoint.manifest import find_fault
from vit_jax.observe.console import log
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import CHECKPOINTS


def list_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a workdir, in ascending order."""
    return _steps_in(workdir / CHECKPOINTS)


def find_checkpoint(folder: Path, *, items: Sequence[str] | None = None) -> Path:
    """Returns the folder of the newest checkpoint that is not damaged.

    Args:
      folder: a workdir, a folder of checkpoints, or one checkpoint, which is returned as it is.
      items: the parts of a checkpoint that must not be damaged, such as `params`; None for all.
        Newer checkpoints that are skipped are logged. If all are damaged, the newest is returned.

    Raises:
      UserError: the folder has no checkpoint.
    """
    parent = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    paths = [(parent / str(step)).absolute() for step in reversed(_steps_in(parent))]
    skipped = []
    for path in paths:
        if (fault := find_fault(path, items)) is None:
            for line in skipped:
                log(line)
            return path
        skipped.append(f"skipped {path}, which is damaged: {fault}")
    if paths:
        return paths[0]
    if any((folder / name).exists() for name in ("params", "_METADATA")):
        return folder.absolute()
    raise UserError(
        f"{str(folder)!r} has no checkpoint; expected the workdir of a run, or a checkpoint"
    )


def _steps_in(folder: Path) -> list[int]:
    # Checkpoints that are being written or removed have other names.
    names = (path.name for path in folder.glob("*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())
