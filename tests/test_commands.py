# SPDX-License-Identifier: Apache-2.0
"""`vit_jax COMMAND`: one entry point for all commands."""

import subprocess
import sys
from pathlib import Path

import pytest

import vit_jax
from vit_jax.__main__ import COMMANDS, LISTINGS, main
from vit_jax.checkpoint.pretrained.catalogue import load_catalogue

PACKAGE = Path(vit_jax.__file__).parent


def test_every_module_that_is_a_command_has_a_name():
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__main__")
        for path in PACKAGE.rglob("*.py")
        if 'if __name__ == "__main__":\n    run' in path.read_text()
    }
    # `launch` starts a job on this machine; the launcher for GKE is for administrators of clusters.
    assert modules - {"__main__", "launch.gke"} == set(COMMANDS.values())


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_every_command_and_what_it_does(argv, capsys):
    main(argv)
    shown = capsys.readouterr().out
    for name in (*COMMANDS, *LISTINGS):
        (line,) = [text for text in shown.splitlines() if text.startswith(f"  {name} ")]
        assert len(line.split()) > 4, line


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{vit_jax.__version__}\n"


def test_a_command_gets_its_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.delitem(sys.modules, "vit_jax.status", raising=False)
    with pytest.raises(SystemExit) as e:
        main(["status", "runs", "--wrong"])
    assert e.value.code == 2
    assert "--wrong" in capsys.readouterr().err


def test_listings_name_configs_and_weights(capsys):
    main(["configs"])
    assert "\n  folder " in capsys.readouterr().out
    main(["configs", "folder"])
    assert "Trains a small ViT from scratch" in capsys.readouterr().out
    main(["models"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(load_catalogue())
    main(["models", "r26"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [name for name in load_catalogue() if "r26" in name.lower()]


def test_help_listings_and_typos_import_no_large_library():
    program = (
        "import sys\nfrom vit_jax.__main__ import main\n"
        "main(['--help']); main(['configs']); main(['models'])\n"
        "print({'jax', 'numpy', 'tensorflow_datasets', 'cv2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
