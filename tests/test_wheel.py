# SPDX-License-Identifier: Apache-2.0
"""The package as `pip install` leaves it: an environment of its own, and an empty folder."""

import json
import os
import site
import subprocess
import sys
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

from tests.images import write_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta as b; b.build_sdist('{0}'); b.build_wheel('{0}')"
# The checkout must not be found in place of the wheel.
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
SHORT = ["--config.total_steps=4", "--config.optimizer.warmup_steps=2"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of the sdist and of the wheel that is made from its content."""
    folder = tmp_path_factory.mktemp("dist")
    tree = tmp_path_factory.mktemp("tree") / "vit_jax"
    files = subprocess.check_output(["git", "-C", str(ROOT), "ls-files", "-z"], text=True)
    for name in filter(None, files.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", BUILD.format(folder)], cwd=tree, check=True)
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """The `bin` of an environment with the wheel, which borrows its dependencies from here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (wheel,) = dist.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    subprocess.run([*command, "--no-deps", "--no-index", "-q", str(wheel)], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # After the packages of the environment: the checkout is not found before the wheel.
    (own / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("an empty folder")


def call(installed, folder, *arguments):
    done = subprocess.run(
        [installed / "vit_jax", *arguments], cwd=folder, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def trained(installed, empty):
    """The workdir of a short run, from the folder where commands are called."""
    call(installed, empty, "train", "--config=digits", "--workdir=runs/digits", *SHORT)
    return "runs/digits"


def test_the_wheel_is_what_runs(installed, empty):
    program = "import vit_jax; print(vit_jax.__file__)"
    command = [installed / "python", "-c", program]
    path = subprocess.check_output(command, cwd=empty, env=ENV, text=True)
    assert path.startswith(str(installed.parent))


def test_the_wheel_has_configs_types_and_no_tests(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {Path(name).name for name in names if name.startswith("vit_jax/config/files/")}
    assert {path.name for path in (ROOT / "configs").glob("*.py")} <= shipped
    assert "vit_jax/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "configs/"))]


def test_a_run_from_an_empty_folder_is_used_by_all_commands(installed, empty, trained):
    assert "digits" in call(installed, empty, "configs")
    assert "step 4 of 4" in call(installed, empty, "status", trained)
    scores = json.loads(call(installed, empty, "evaluate", f"--workdir={trained}", "--json"))
    assert "test/top1" in json.dumps(scores)
    write_folder(empty / "photos", {"zero": 2})
    shown = call(installed, empty, "predict", f"--workdir={trained}", "photos/zero")
    assert len(shown.splitlines()) >= 2
    call(installed, empty, "export", f"--workdir={trained}", "--to=stablehlo", "--output=exported")
    assert any((empty / "exported").iterdir())


def test_images_of_ones_own_are_trained_on(installed, empty):
    for split, count in (("train", 60), ("test", 4)):
        write_folder(empty / "birds" / split, {"robin": count, "wren": count})
    sizes = ["--config.data.batch_size=8", "--config.epochs=1"]
    words = ["--config=folder", "--workdir=runs/birds", f"--config.data.name=folder:{empty}/birds"]
    call(installed, empty, "train", *words, *sizes)
    assert (empty / "runs" / "birds" / "labels.txt").read_text() == "robin\nwren\n"


def test_the_server_answers(installed, empty, trained):
    server = subprocess.Popen(
        [installed / "vit_jax", "serve", f"--workdir={trained}", "--port=0"],
        cwd=empty,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        deadline = time.monotonic() + 300
        for line in server.stdout:
            if "http://" in line:
                break
            assert time.monotonic() < deadline
        url = "http://" + line.split("http://")[1].split()[0].strip("/,.")
        with urllib.request.urlopen(f"{url}/healthz") as answer:
            assert answer.status == 200
    finally:
        server.terminate()
        server.communicate(timeout=60)
