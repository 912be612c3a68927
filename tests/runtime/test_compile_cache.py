# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are found again by the next process."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from vit_jax.runtime import compile_cache
from vit_jax.utils.errors import UserError

COMPILES = """
import sys, jax, jax.numpy as jnp
from vit_jax.runtime import compile_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
compile_cache.set_up(*sys.argv[1:] or [None])
jax.jit(lambda x: jnp.sin(x) + 1)(1.0)
print("said" + compile_cache.summary())
"""


def compile_once(tmp_path, *arguments):
    unset = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, *arguments],
        env=unset | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_second_process_finds_what_the_first_compiled(tmp_path):
    assert compile_once(tmp_path) == "said, compile cache: 0 hits, 1 miss"
    assert compile_once(tmp_path) == "said, compile cache: 1 hit, 0 misses"
    assert list(tmp_path.glob("vit_jax/compiled-*/*"))
    assert compile_once(tmp_path, "off") == "said"


def test_entries_that_fail_are_one_line_and_leave_no_half(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vit_jax"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("vit_jax"), "handlers", [])
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    compile_cache._log_failures(tmp_path)
    old, half = tmp_path / "jit_f-1-cache", tmp_path / "jit_f-2-cache"
    for age, path in enumerate((half, old)):
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    error = "persistent compilation cache entry for 'jit_f': OSError: No space left"
    for text in (f"Error writing {error}", f"Error reading {error}", f"Error reading {error}", "x"):
        warnings.showwarning(UserWarning(text), UserWarning, "compiler.py", 1)
    assert shown == ["x"]
    assert [record.getMessage() for record in caplog.records] == [
        f"compile cache: an entry of {tmp_path} can't be {what} (OSError: No space left): the "
        "program is compiled"
        for what in ("written", "read")
    ]
    assert old.exists()
    assert not half.exists()


def test_a_folder_that_is_none_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"--compile_cache=.*/file/x: expected a folder"):
        compile_cache.set_up(str(file / "x"))
