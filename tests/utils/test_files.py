# SPDX-License-Identifier: Apache-2.0
import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest

from vit_jax.utils.errors import UserError
from vit_jax.utils.files import atomic_file, fresh_file, fresh_folder, write_atomically


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with atomic_file(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "after"}


def test_a_failure_leaves_the_file_as_it_was_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with contextlib.suppress(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "before"}


def test_two_writers_of_a_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_file(path) as first:
        first.write_text("first")
        with atomic_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "first"}


def test_what_a_killed_writer_left_is_removed_and_no_other_file(tmp_path):
    others = {"a.txt.tmp", "a.txt.12345678.tmp.old", "ba.txt.12345678.tmp", "a.txt.1234567g.tmp"}
    for name in {"a.txt.0123abcd.tmp", *others}:
        (tmp_path / name).write_text("half")
    write_atomically(tmp_path / "a.txt", "whole")
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt", *others}


def test_a_temporary_file_that_another_process_took_is_replaced(tmp_path, monkeypatch):
    seen, flock = [], fcntl.flock

    def remove_first(file, how):
        seen.append(file.name)
        if len(seen) == 1:
            Path(file.name).unlink()
        elif len(seen) == 2:
            raise BlockingIOError
        elif len(seen) == 3:
            raise OSError(errno.ENOLCK, "No locks available")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    write_atomically(tmp_path / "a.txt", "whole")
    assert len(set(seen)) == 3
    assert (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_leftovers_of_another_user_do_no_harm(tmp_path):
    (tmp_path / "a.txt.0123abcd.tmp").touch(mode=0o000)
    write_atomically(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    write_atomically(tmp_path / "a.txt", "whole")
    (tmp_path / "b.txt").touch()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


@pytest.mark.parametrize("content", ["ä\n", b"\xff\x00"])
def test_text_and_bytes_are_written_into_a_new_folder(tmp_path, content):
    path = tmp_path / "new" / "a"
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("sync", [False, True])
def test_content_is_on_the_disk_before_the_name_where_that_is_asked_for(
    tmp_path, monkeypatch, sync
):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *a: [calls.append("replace"), replace(*a)])
    write_atomically(tmp_path / "a", "text", sync=sync)
    assert calls == ["fsync"] * sync + ["replace"]


@pytest.mark.parametrize("fresh", [fresh_file, fresh_folder])
def test_an_output_that_exists_is_refused(tmp_path, fresh):
    with pytest.raises(UserError, match="exists; remove it"), fresh(tmp_path):
        raise AssertionError


@pytest.mark.parametrize("fresh", [fresh_file, fresh_folder])
def test_an_output_that_can_not_be_written_is_a_user_error(tmp_path, fresh):
    with pytest.raises(UserError, match="a/b can't be written"), fresh(tmp_path / "a" / "b"):
        raise OSError(28, "No space left on device")
    assert not list((tmp_path / "a").iterdir())
