# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints are named and skipped, whichever of their files it is."""

import contextlib
import json
import os
import shutil

import pytest

from tests.checkpoint.test_manager import abstract, assert_same, make_state, restore, save
from vit_jax.checkpoint.listing import find_checkpoint
from vit_jax.checkpoint.manager import CheckpointManager, CheckpointOptions, SaveError
from vit_jax.checkpoint.manifest import MANIFEST, checksum_of, find_fault
from vit_jax.checkpoint.pretrained.load import load_params
from vit_jax.utils.errors import UserError
from vit_jax.utils.layout import RUN


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Workdir of the checkpoints 4 and 8; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, make_state(4), make_state(8), keep=2)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "w")
    return tmp_path / "w"


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {"flipped": flip_bit, "cut": cut, "empty": lambda p: os.truncate(p, 0)}


@contextlib.contextmanager
def put_back(path):
    content = path.read_bytes()
    yield
    path.write_bytes(content)


def sign(folder, files):
    """Writes a manifest of these files with a checksum that is right."""
    content = {"algorithm": "crc32", "files": files}
    text = json.dumps(content | {"crc32": checksum_of(content)})
    (folder / MANIFEST).write_text(text)


ENTRIES = {
    "outside": {"../../metrics.jsonl": [0, "00000000"]},
    "root": {"/etc/passwd": [1, "00000000"]},
    "device": {"/dev/zero": [0, "00000000"]},
    "no_name": {"": [0, "00000000"]},
    "long_name": {"a" * 10**6: [0, "00000000"]},
    "null": {"params/_METADATA": None},
    "text": {"params/_METADATA": "00"},
    "one": {"params/_METADATA": [5]},
    "large": {"params/_METADATA": [10**30, "00000000"]},
    "negative": {"params/_METADATA": [-1, "00000000"]},
    "real": {"params/_METADATA": [1.5, "00000000"]},
    "number": {"params/_METADATA": [5, 5]},
    "list": ["params/_METADATA"],
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_right_checksum_makes_no_manifest_right(name, workdir):
    folder = workdir / "checkpoints" / "8"
    sign(folder, ENTRIES[name])
    fault = find_fault(folder)
    assert fault.startswith(MANIFEST)
    assert len(fault) < 300
    assert find_checkpoint(workdir).name == "4"


@pytest.mark.parametrize("signed", [True, False], ids=["named", "beside"])
def test_a_fifo_in_a_checkpoint_is_a_fault_and_is_not_waited_for(signed, workdir):
    folder = workdir / "checkpoints" / "8"
    os.mkfifo(folder / "params" / "fifo")
    if signed:
        sign(folder, {"params/fifo": [0, "00000000"]})
    assert "it is a FIFO, not a file" in find_fault(folder)
    assert find_checkpoint(workdir).name == "4"
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    assert "it is a FIFO, not a file" in find_fault(folder)


def test_a_checkpoint_that_is_linked_from_another_disk_is_whole(workdir, tmp_path):
    folder = workdir / "checkpoints" / "8"
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert find_fault(folder) is None


@pytest.mark.parametrize("damage", [*DAMAGES, "removed"])
def test_damage_to_any_file_is_found_and_the_file_is_named(damage, saved):
    folder = saved / "checkpoints" / "8"
    assert find_fault(folder) is None
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 10
    for path in files:
        with put_back(path):
            DAMAGES.get(damage, os.remove)(path)
            fault = find_fault(folder)
            assert fault is not None, path
            assert fault.startswith(path.relative_to(folder).as_posix())
    assert find_fault(folder) is None


def test_every_half_of_its_files_is_too_little(saved, tmp_path):
    folder = saved / "checkpoints" / "8"
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for part in (files[::2], files[1::2], files[: len(files) // 2], files[len(files) // 2 :]):
        half = tmp_path / "half"
        shutil.copytree(folder, half)
        for path in part:
            (half / path.relative_to(folder)).unlink()
        assert find_fault(half) is not None
        shutil.rmtree(half)


@pytest.mark.parametrize("damage", [*DAMAGES, "removed"])
def test_the_one_before_is_restored_and_the_damaged_one_moved(damage, workdir, said):
    path = next((workdir / "checkpoints/8/params/d").iterdir())
    DAMAGES.get(damage, os.remove)(path)
    with CheckpointManager(workdir, CheckpointOptions(), {}) as checkpoints:
        assert checkpoints.latest_step() == 4
        (line,) = said
        assert f"skipped {workdir}/checkpoints/8, which is damaged: params/d/{path.name}" in line
        assert (workdir / "checkpoints" / "8").is_dir()
        assert_same(checkpoints.restore(abstract(make_state())), make_state(4))
        assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4"]
        assert (workdir / "broken" / "8" / "params").is_dir()
        checkpoints.save(8, make_state(8), {})
    assert_same(restore(workdir, abstract(make_state())), make_state(8))


def test_parameters_are_not_taken_from_a_damaged_checkpoint(workdir, said):
    flip_bit(next((workdir / "checkpoints/8/params/d").iterdir()))
    assert_same(load_params(workdir)[0], make_state(4).params)
    assert "checkpoints/8, which is damaged" in said[0]
    assert find_checkpoint(workdir).name == "4"
    for folder in ("checkpoints/8", "checkpoints/8/params"):
        with pytest.raises(UserError, match=r"checkpoints/8/params can't be read: params/d/"):
            load_params(workdir / folder)


def test_where_none_is_whole_nothing_starts_and_nothing_is_touched(workdir):
    for step in (4, 8):
        cut(workdir / "checkpoints" / str(step) / "training" / "_METADATA")
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    with pytest.raises(UserError) as error:
        CheckpointManager(workdir, CheckpointOptions(), {})
    for word in ("checkpoints/8 can't be restored: training/_METADATA", "no older one is whole"):
        assert word in str(error.value)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}


def test_a_checkpoint_of_an_older_version_loads_and_that_is_said(workdir, said):
    for name in (MANIFEST, RUN):
        (workdir / "checkpoints" / "8" / name).unlink()
    assert_same(restore(workdir, abstract(make_state())), make_state(8))
    assert said == [f"{workdir}/checkpoints/8 was written without checksums: it can't be verified"]
    (workdir / "checkpoints/8/training/manifest.ocdbt").unlink()
    assert_same(restore(workdir, abstract(make_state())), make_state(4))


def test_older_ones_go_only_when_the_new_one_is_complete(workdir, monkeypatch):
    with CheckpointManager(workdir, CheckpointOptions(keep=1), {}) as checkpoints:
        monkeypatch.setattr(
            "vit_jax.checkpoint.manager.write_manifest",
            lambda _: (_ for _ in ()).throw(OSError(28, "No space left")),
        )
        checkpoints.save(12, make_state(12), {})
        with pytest.raises(SaveError, match=r"step 12 can't be written \(OSError: .*No space left"):
            checkpoints.wait(must=True)
    monkeypatch.undo()
    assert find_fault(workdir / "checkpoints/4") is find_fault(workdir / "checkpoints/8") is None
    save(workdir, make_state(12))
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["12"]


def test_a_checkpoint_says_what_it_came_from(tmp_path):
    with CheckpointManager(tmp_path, CheckpointOptions(), {}) as checkpoints:
        assert checkpoints.read_run() == {}
        checkpoints.run = {"data": "abc"}
        checkpoints.save(4, make_state(4), {})
        checkpoints.wait()
        assert checkpoints.read_run() == {"step": 4, "data": "abc"}
    assert json.loads((tmp_path / "checkpoints/4" / RUN).read_text())["step"] == 4
