# SPDX-License-Identifier: Apache-2.0
"""The configs that come with the package, found by name."""

import ast
import os
from collections.abc import Mapping
from pathlib import Path

from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import CONFIG
from vit_jax.utils.suggestions import find_near, fold, suggest

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
    raise UserError(f"there is no file {name}, nor a config of this name{_suggest(name, shipped)}")


def _suggest(name: str, shipped: Mapping[str, Path]) -> str:
    path = Path(name)
    if name and os.path.isdir(path):
        if (path / CONFIG).exists():
            return f"; {name} is a workdir: give the config that it was trained with"
        files = [str(file) for file in sorted(path.glob("*.py"))]
        return f"; {name} is a folder{f': give a file, such as {files[0]}' if files else ''}"
    if os.path.isfile(file := f"{name}.py"):
        return f"; did you mean '{file}'?"
    stem = path.name.removesuffix(".py") or name
    near = find_near(stem, shipped)
    # Of the user's files only those whose folder exists as it is named.
    if os.path.isdir(path.parent):
        files = {file.stem: str(file) for file in path.parent.glob("*.py")}
        own = find_near(stem, files)
        if own is not None and (near is None or fold(near) != fold(stem)):
            return f"; did you mean {files[own]!r}?"
    return f"; did you mean {near!r}?" if near is not None else suggest(stem, shipped)


def _find_all() -> dict[str, Path]:
    for folder in _FOLDERS:
        files = sorted(folder.glob("*.py"))
        if files:
            return {file.stem: file for file in files}
    return {}
