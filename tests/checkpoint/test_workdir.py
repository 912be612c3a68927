# SPDX-License-Identifier: Apache-2.0
"""The files of a run, and the lock on them."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.checkpoint.listing import list_steps
from vit_jax.checkpoint.workdir import (
    check_files,
    find_holder,
    find_step,
    lock_workdir,
    write_config,
)
from vit_jax.utils.errors import UserError


def test_a_config_that_finds_no_room_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, *_, **__):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"config\.json can't be written \(No space left on device"):
        write_config(tmp_path, {"seed": 0})
    assert list(tmp_path.iterdir()) == []


HOLDS = """
import sys, time
from pathlib import Path
from vit_jax.checkpoint.workdir import lock_workdir
with lock_workdir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, lock_workdir(tmp_path):
            pass
        assert f"in use by process {first.pid} on {socket.gethostname()}" in str(error.value)
        assert find_holder(tmp_path) == f"process {first.pid} on {socket.gethostname()}"
        with lock_workdir(tmp_path, active=False):
            pass
        first.kill()
        first.wait()
    assert (tmp_path / "lock").exists()
    assert find_holder(tmp_path) is None
    with lock_workdir(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl", "config.json", "labels.txt"])
@pytest.mark.parametrize("kind", ["folder", "broken link", "unreadable"])
def test_a_file_of_another_kind_is_one_line(name, kind, tmp_path, monkeypatch):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to(tmp_path / "none")
    else:
        path.touch()

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
    reasons = {
        "folder": "not a file",
        "broken link": f"a link to {tmp_path / 'none'}, which does not exist",
        "unreadable": "Permission denied",
    }
    with pytest.raises(UserError) as error:
        check_files(tmp_path)
    assert f"{name} can't be used ({reasons[kind]}); expected a file" in str(error.value)


def test_a_link_to_a_file_is_as_good_as_the_file(tmp_path):
    (tmp_path / "elsewhere").touch()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    check_files(tmp_path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "Is a directory"),
        (os.mkfifo, "it is not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is not a file"),
    ],
)
def test_a_lock_of_another_kind_is_one_line(make, reason, tmp_path):
    make(tmp_path / "lock")
    with (
        pytest.raises(UserError, match=rf"lock can't be opened \({reason}\)"),
        lock_workdir(tmp_path),
    ):
        pass
    assert os.path.lexists(tmp_path / "lock")


def test_a_lock_needs_no_room_on_the_disk(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, old[1]))
    try:
        with lock_workdir(tmp_path):
            assert find_holder(tmp_path) == "another process"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not (tmp_path / "lock").exists()


def test_names_that_are_almost_those_of_steps_are_skipped_and_named(tmp_path, said):
    for name in ("20", "00020", "007", "٣", "1" * 19, "²", "20.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for _ in range(2):
        assert list_steps(tmp_path) == [20]
    named = [
        line.partition(" is skipped: its name is not that of a checkpoint")[0] for line in said
    ]
    strays = sorted(("00020", "007", "٣", "1" * 19))
    assert named == [str(tmp_path / "checkpoints" / name) for name in strays]
    for wrong in ("00020", "²", "٣", "9" * 5000):
        with pytest.raises(UserError, match="has 20"):
            find_step(tmp_path, wrong)
