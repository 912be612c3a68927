# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks, and keeps what their cells show in them.

python -m tools.notebooks [NAME ...]

Runs `notebooks/NAME.ipynb`, all by default, in a copy of the folder whose results are not kept. It
needs nbclient and ipykernel, which `make test-all` installs.
"""

import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"


def run_notebook(path: Path, folder: Path, *, timeout: float) -> Any:
    """Runs a copy of a notebook in `folder/notebooks`; returns it with its outputs.

    Args:
      path: of the notebook.
      folder: to which configs are linked, and to which the notebook writes.
      timeout: of a cell, in seconds.
    """
    nbclient, nbformat = map(importlib.import_module, ("nbclient", "nbformat"))
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "notebooks").mkdir(exist_ok=True)
    shutil.copy(path, folder / "notebooks")
    notebook = nbformat.read(folder / "notebooks" / path.name, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(folder / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=timeout, resources=where).execute()
    return notebook


def tidy(notebook: Any) -> Any:
    """Removes from a notebook what is of one execution or one machine; returns it.

    Logged lines become plain text, one output for all that follow each other. Errors and warnings
    of libraries (stderr) are left out, and of a picture only the PNG is kept.
    """
    language = notebook["metadata"]["language_info"]["name"]
    notebook["metadata"]["language_info"] = {"name": language}
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["outputs"] = _tidy_outputs(cell["outputs"])
    return notebook


def _tidy_outputs(outputs: Sequence[Any]) -> list[Any]:
    kept: list[Any] = []
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr":
            continue
        data.pop("image/jpeg", None)
        if output["output_type"] == "display_data" and "text/html" in data:
            line = data["text/plain"].rstrip("\n") + "\n"
            # Absolute paths are of the folder in which it ran.
            line = re.sub(r"/\S*/notebooks/\.\./", "../", line)
            output = {"output_type": "stream", "name": "stdout", "text": line}
        last = kept[-1] if kept else {}
        if output["output_type"] == last.get("output_type") == "stream":
            last["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def main() -> None:
    """Runs the notebooks that are named, or all."""
    nbformat = importlib.import_module("nbformat")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    names = sys.argv[1:] or ["quickstart", "finetune", "attention"]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = FOLDER / f"{name}.ipynb"
            notebook = tidy(run_notebook(path, Path(folder), timeout=1200))
            nbformat.write(nbformat.from_dict(notebook), path)
            print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    main()
