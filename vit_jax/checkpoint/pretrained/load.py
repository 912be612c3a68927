# SPDX-License-Identifier: Apache-2.0
"""Parameters to start from, wherever they are."""

from pathlib import Path
from typing import Any

from vit_jax.checkpoint.manager import FOLDER, load_params
from vit_jax.checkpoint.pretrained.npz import load_npz
from vit_jax.utils.errors import UserError


def load_pretrained(path: str) -> dict[str, Any]:
    """Reads a workdir of this package or a published `.npz`.

    Raises:
      UserError: it is neither, or is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        return load_npz(path)
    if not (folder / FOLDER).is_dir():
        raise UserError(
            f"init_from={path!r} has no folder {FOLDER!r}; expected a workdir, or a .npz file"
        )
    return load_params(folder)
