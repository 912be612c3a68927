# SPDX-License-Identifier: Apache-2.0
import json
import platform

import numpy as np

from benchmarks.environment import write_results


def test_results_are_written_after_the_environment_they_are_of(tmp_path, capsys):
    path = tmp_path / "new" / "results.json"
    write_results(path, {"runs": [1.5], "date": "2026-01-01"}, "numpy")
    assert capsys.readouterr().out == f"wrote {path}\n"
    found = json.loads(path.read_text())
    assert list(found) == ["date", "machine", "versions", "runs"]
    assert found["versions"] == {"python": platform.python_version(), "numpy": np.__version__}
    assert (found["runs"], found["date"]) == ([1.5], "2026-01-01")
    write_results(path, {"runs": []}, indent=None)
    assert len(path.read_text().splitlines()) == 1
