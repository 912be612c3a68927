# SPDX-License-Identifier: Apache-2.0
"""The parts on the page "Extend it" work, from a folder that has nothing to do with the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, read_blocks, split_commands, write_modules

PAGE = ROOT / "docs" / "extend.md"
COMMANDS = [words for b in read_blocks(PAGE) if b.is_shell for words in split_commands(b.text)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """Runs a command of the page in a folder with its modules; gives the code and what it said."""
    modules = tmp_path_factory.mktemp("modules")
    home = tmp_path_factory.mktemp("home")
    write_modules(PAGE, modules)
    for name in ("configs", "docs"):
        (home / name).symlink_to(ROOT / name)
    env = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(modules), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        "TFDS_DATA_DIR": str(home / "tfds"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }

    def run(words, *more):
        done = subprocess.run(
            [sys.executable, *words[1:], *more], cwd=home, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr, home

    return run


def find(module, workdir):
    (words,) = (w for w in COMMANDS if w[2] == module and f"--workdir=runs/{workdir}" in w)
    return words


def test_all_parts_train_and_are_found_again(run):
    code, said, home = run(find("vit_jax.main", "extended"))
    assert code == 0, said
    workdir = Path(home / "runs" / "extended")
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"] == {
        "name": "my_models:ConvNet",
        "num_classes": 10,
        "width": 32,
        "dropout_rate": 0.0,
    }
    assert config["objective"] == {"name": "my_objectives:Brier", "scale": 10.0}
    assert config["evals"]["sure"]["power"] == 1.0
    tracked = [json.loads(line) for line in (workdir / "tracked.jsonl").read_text().splitlines()]
    assert tracked[-1] == {"status": "FINISHED"}
    assert any("sure/confidence" in record for record in tracked)
    evaluate = find("vit_jax.evaluate", "extended")
    code, said, _ = run(evaluate, "--json")
    assert code == 0, said
    assert "sure/confidence" in said
    # In a process of its own: within this one, other tests may have imported the parts.
    code, said, _ = run([w for w in evaluate if not w.startswith("--parts")])
    assert code == 2
    (line,) = (line for line in said.splitlines() if "error" in line)
    assert "--parts=my_" in line
    code, said, _ = run(find("vit_jax.predict", "extended"))
    assert code == 0, said
    assert "preprocessing.png" in said


@pytest.mark.slow
@pytest.mark.parametrize("workdir", ["convnet", "squares", "stains"])
def test_other_commands_of_the_page_train(run, workdir):
    code, said, home = run(find("vit_jax.main", workdir))
    assert code == 0, said
    assert (home / "runs" / workdir / "checkpoints" / "20").is_dir()
