# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks, and keeps what their cells show in them.

python -m tools.notebooks [NAME ...]

Runs `notebooks/NAME.ipynb`, all by default, in a copy of the folder whose results are not kept. It
needs nbclient and ipykernel, which `make test-all` installs.
"""

import importlib
import os
import shutil
import sys
import tempfile
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
    """Removes the times and versions that an execution leaves in a notebook; returns it."""
    language = notebook["metadata"]["language_info"]["name"]
    notebook["metadata"]["language_info"] = {"name": language}
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] != "code":
            continue
        # A text that was printed in several parts is one output.
        outputs: list[Any] = []
        for output in cell["outputs"]:
            last = outputs[-1] if outputs else {}
            if output["output_type"] == "stream" and last.get("name") == output["name"]:
                last["text"] += output["text"]
            else:
                outputs.append(output)
        cell["outputs"] = outputs
    return notebook


def main() -> None:
    """Runs the notebooks that are named, or all."""
    nbformat = importlib.import_module("nbformat")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    names = sys.argv[1:] or ["quickstart", "finetune", "attention"]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = FOLDER / f"{name}.ipynb"
            nbformat.write(tidy(run_notebook(path, Path(folder), timeout=1200)), path)
            print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    main()
