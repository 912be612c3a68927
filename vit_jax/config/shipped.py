# SPDX-License-Identifier: Apache-2.0
"""The configs that come with the package, found by name."""

import ast
from pathlib import Path

from vit_jax.utils.errors import UserError, suggest

_PACKAGE = Path(__file__).parents[1]
# A wheel carries the folder within the package; its home in a checkout is next to the package.
_FOLDERS = (_PACKAGE / "config" / "files", _PACKAGE.parent / "configs")


def list_configs() -> dict[str, str]:
    """Returns the summary of each config that comes with the package, by name.

    The name is what `--config` takes; the summary is the first line of the file's docstring.
    """
    return {name: read_docstring(path).partition("\n")[0] for name, path in _find_all().items()}


def read_docstring(path: Path) -> str:
    """Returns the docstring of a Python file, without running the file."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def find_config(name: str) -> Path:
    """Returns the file of a config: a path, or else the name of one that `list_configs` has.

    Raises:
      UserError: neither a file nor a config of this name exists.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = _find_all()
    if name in shipped:
        return shipped[name]
    near = name.removeprefix("configs/").removesuffix(".py")
    hint = f"; did you mean {near!r}?" if near in shipped else suggest(near, shipped)
    raise UserError(f"there is no file {name}, nor a config of this name{hint}")


def _find_all() -> dict[str, Path]:
    for folder in _FOLDERS:
        files = sorted(folder.glob("*.py"))
        if files:
            return {file.stem: file for file in files}
    return {}
