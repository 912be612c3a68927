# SPDX-License-Identifier: Apache-2.0
"""A command of the package, run within the process of the test."""

import importlib
import sys

from absl.testing import flagsaver

from vit_jax.runtime import compile_cache
from vit_jax.utils.command import report_errors, run_command


def call(command, argv, monkeypatch):
    """Runs a command as its shell would, and returns the exit code."""
    module = importlib.import_module(f"vit_jax.{command}")
    # The cache is set for the whole process, and would outlive the command.
    monkeypatch.setattr(compile_cache, "set_up", lambda folder: None)
    for name in ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", [f"vit_jax.{command}", *argv])
    try:
        if command == "main":
            with flagsaver.flagsaver(), report_errors():
                module.main(module.parse_flags(sys.argv))
        else:
            run_command(module.main)
    except SystemExit as e:
        return e.code
    return 0
