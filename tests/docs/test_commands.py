# SPDX-License-Identifier: Apache-2.0
"""What README and docs/ tell a reader to type exists, and works."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import (
    NEEDS,
    PAGES,
    ROOT,
    add_overrides,
    check_command,
    find_workdirs,
    inline_commands,
    knows,
    named_keys,
    read_blocks,
    split_commands,
    write_modules,
)
from vit_jax.utils.errors import UserError

BLOCKS = [block for page in PAGES for block in read_blocks(page)]
SHELL = [block for block in BLOCKS if block.is_shell]
RUN = [block for block in BLOCKS if (block.is_shell or block.is_program) and not block.needs]
WORKDIRS = {
    workdir: config
    for block in SHELL
    for words in split_commands(block.text)
    for workdir, config in find_workdirs(words).items()
}
# What all pages may start from: the first command of README, run to its end.
DIGITS = ["--config=configs/digits.py", "--workdir=runs/digits"]
BLOCK_SECONDS = 1800


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """The modules that pages show can be imported."""
    folder = tmp_path_factory.mktemp("modules")
    for page in PAGES:
        write_modules(page, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist(block):
    for words in split_commands(block.text):
        check_command(words, WORKDIRS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_exist(page):
    for command in inline_commands(page):
        for words in split_commands(command):
            check_command(words, WORKDIRS, partial=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_sentences_exist(page):
    assert [key for key in named_keys(page) if not knows(key)] == []


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_marks_are_known_and_python_is_python(block):
    assert {*block.needs} <= {*NEEDS}
    if block.language == "python":
        compile(block.text, str(block), "exec")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python -m vit_jax.main --config=configs/digits.py --workdirs=runs/x", "workdirs"),
        ("python -m vit_jax.main --config=configs/none.py --workdir=runs/x", "none.py"),
        ("python -m vit_jax.main --config=configs/digits.py --config.model.depth=3", "depth"),
        ("python -m vit_jax.evaluate --workdir=runs/digits --config.data.batch=3", "batch"),
        ("python -m vit_jax.predict --workdir=runs/digits --topk=3 photos", "topk"),
        ("python -m vit_jax.losses --config=configs/digits.py", "takes no arguments"),
        ("python -m vit_jax.fit", "no module"),
        ("make nothing", "nothing"),
        ("pip install -e '.[cpu]'", "cpu"),
    ],
)
def test_what_does_not_exist_is_found(command, error):
    (words,) = split_commands(command)
    with pytest.raises((UserError, AssertionError), match=error):
        check_command(words, WORKDIRS)


def test_a_script_is_split_into_commands():
    text = "A=1 python -m x --k='a|b' \\\n  y  # why\nfind p | sort && ls\n"
    text += "python - <<'END'\nx = 1\nEND"
    assert split_commands(text) == [
        ["python", "-m", "x", "--k=a|b", "y"],
        ["find", "p"],
        ["sort"],
        ["ls"],
        ["python", "-"],
    ]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder for caches and the trained digits, the same for all processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "docs"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "trained").exists():
            checkout = make_checkout(shared / "checkout")
            command = ["python", "-m", "vit_jax.main", *DIGITS]
            subprocess.run(command, cwd=checkout, env=make_env(checkout, shared), check=True)
            (shared / "trained").touch()
    return shared


def make_checkout(folder: Path) -> Path:
    """A folder with the files of the repository, an environment, and nothing else."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("benchmarks", "configs", "docs", "notebooks", "tools", "vit_jax", "setup.py"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv" / "bin" / "activate").touch()
    return folder


def make_env(checkout: Path, home: Path) -> dict[str, str]:
    """Of a reader's shell: one device, caches of its own, and `python` of the environment."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TFDS_"))}
    path = f"{checkout / '.venv' / 'bin'}{os.pathsep}{env['PATH']}"
    return env | {"PATH": path, "HOME": str(home), "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("page", dict.fromkeys(b.page for b in RUN), ids=lambda page: page.name)
def test_commands_run_as_they_stand(page, home, tmp_path):
    checkout = make_checkout(tmp_path / "checkout")
    write_modules(page, checkout)
    shutil.copytree(home / "checkout" / "runs", checkout / "runs")
    # Programs that run for a moment are compiled faster than well.
    env = make_env(checkout, home) | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    for block in (b for b in RUN if b.page == page):
        command = ["bash", "-euo", "pipefail", "-c", add_overrides(block)]
        if block.is_program:
            command = ["python", "-c", block.text]
        done = subprocess.run(
            command,
            cwd=checkout,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BLOCK_SECONDS,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
