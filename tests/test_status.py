# SPDX-License-Identifier: Apache-2.0
"""Commands that only read the files of a workdir start without the libraries of training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vit_jax

HEAVY = {"tensorflow_datasets", "cv2", "grain", "orbax", "jax", "flax", "optax", "tensorboardX"}
ROOT = Path(vit_jax.__file__).parent


def imported(*arguments):
    """Top-level names of all modules that a Python process imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("command", ["status", "compare"])
def test_a_command_that_reads_json_imports_no_library_of_training(command):
    names = imported("-m", f"vit_jax.{command}", "--help")
    assert "rich" in names
    assert not names & HEAVY


SECONDS = dict.fromkeys(("step", "compile", "data_wait", "save", "evaluation"), 0)
START = {"event": "start", "time": 1.0, "step": 0, "total": 8, "seconds": SECONDS}


@pytest.mark.parametrize("place", [">/dev/full", ">&-"])
@pytest.mark.parametrize("arguments", ["status run", "status run --json"])
def test_a_status_that_can_not_be_printed_is_code_1(place, arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ledger.jsonl").write_text(json.dumps(START))
    done = subprocess.run(
        ["bash", "-c", f'"$0" -m vit_jax.{arguments} {place}', sys.executable],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("vit_jax: error: stdout can't be written to (")
    assert done.stderr.count("\n") == 1


def test_checkpoints_and_records_need_no_library_of_the_input():
    modules = [
        ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
        for folder in ("checkpoint", "observe", "utils")
        for file in sorted((ROOT / folder).rglob("[!_]*.py"))
    ]
    names = imported("-c", f"import {', '.join(modules)}")
    assert {"orbax", "jax"} <= names
    assert not names & {"tensorflow_datasets", "cv2", "grain"}
