# SPDX-License-Identifier: Apache-2.0
"""Commands that only read the files of a workdir start without the libraries of training."""

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


def test_checkpoints_and_records_need_no_library_of_the_input():
    modules = [
        ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
        for folder in ("checkpoint", "observe", "utils")
        for file in sorted((ROOT / folder).rglob("[!_]*.py"))
    ]
    names = imported("-c", f"import {', '.join(modules)}")
    assert {"orbax", "jax"} <= names
    assert not names & {"tensorflow_datasets", "cv2", "grain"}
