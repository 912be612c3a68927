# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from the first cell to the last, and are kept with what they showed."""

import json
import os
from pathlib import Path

import pytest

from tools.notebooks import run_notebook, tidy

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {"quickstart": 2, "finetune": 0, "attention": 5}
MAX_BYTES = 200_000
# Two minutes on two idle cores, with room for busy ones.
CELL_SECONDS = 1200


def count_pictures(notebook):
    outputs = [o for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_with_their_outputs(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    notebook = json.loads(text)
    assert tidy(json.loads(text)) == notebook
    assert count_pictures(notebook) == PICTURES[path.stem]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        source = "".join(cell["source"])
        compile(source, path.name, "exec")
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        if "print(" in source:
            assert cell["outputs"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.fspath(ROOT))
    # `make test-all` installs what this needs.
    notebook = run_notebook(path, tmp_path, timeout=CELL_SECONDS)
    assert (tmp_path / "runs" / "notebooks").is_dir()
    assert count_pictures(notebook) == PICTURES[path.stem]
