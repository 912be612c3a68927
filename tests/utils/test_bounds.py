# SPDX-License-Identifier: Apache-2.0
"""Files of others are refused by kind and size before they are read."""

import io
import os
import socket
import zipfile

import numpy as np
import pytest

from vit_jax.utils import bounds


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_file_is_read_and_a_missing_one_is_not(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": [1]}')
    assert bounds.read_json(tmp_path / "a") == {"a": [1]}
    with pytest.raises(FileNotFoundError):
        bounds.read_bytes(tmp_path / "b")


def test_a_name_that_no_file_can_have_is_an_os_error():
    with pytest.raises(OSError, match="null byte"):
        bounds.open_regular("a\0b", max_bytes=100)


def test_what_is_no_file_is_refused_at_once(tmp_path, fifo):
    (tmp_path / "link").symlink_to(fifo)
    for path, kind in ((fifo, "a FIFO"), (tmp_path / "link", "a FIFO"), ("/dev/zero", "a device")):
        with pytest.raises(OSError, match=f"it is {kind}, not a file"):
            bounds.read_bytes(path)
    with pytest.raises(OSError, match="Is a directory"):
        bounds.read_bytes(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(OSError, match="s"):
            bounds.read_bytes(tmp_path / "s")


def test_large_and_hollow_files_are_refused(tmp_path):
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(OSError, match="it has 11 bytes; expected 10 at most"):
        bounds.read_bytes(tmp_path / "large", max_bytes=10)
    with open(tmp_path / "hollow", "wb") as file:
        file.write(b"{")
        file.truncate(2**40)
    with pytest.raises(OSError, match=r"1,099,511,627,776 bytes, of which [\d,]+ are stored"):
        bounds.open_regular(tmp_path / "hollow", max_bytes=2**41)


def test_a_file_with_a_small_hole_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "_MIN_BOUND", 2**12)
    with open(tmp_path / "a", "wb") as file:
        file.write(os.urandom(2**16))
        file.truncate(2**17)
    assert len(bounds.read_bytes(tmp_path / "a")) == 2**17


def test_json_that_is_nested_too_deeply_is_a_value_error():
    for text in ("[" * 100_000, '{"a":' * 100_000, "9" * 5000, b"\xff"):
        with pytest.raises(ValueError, match=r"nested|digits|decode"):
            bounds.parse_json(text)


@pytest.mark.parametrize(
    "value", [-1, 11, 1.0, True, "1", None, 10**5000, [1] * 10**6], ids=lambda v: type(v).__name__
)
def test_a_count_is_an_integer_within_its_bounds(value):
    with pytest.raises(ValueError, match="expected an integer, 0 to 10") as error:
        bounds.check_count(value, 10, "n")
    assert len(str(error.value)) < 200
    assert bounds.check_count(10, 10, "n") == 10


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a", True),
        ("a/b.c", True),
        ("..a/b", True),
        ("/etc/passwd", False),
        ("../a", False),
        ("a/../../b", False),
        ("a/./b", False),
        ("", False),
        ("a//b", False),
        ("a\0", False),
        ("a\ud800", False),
        ("a" * 5000, False),
    ],
)
def test_names_of_files_stay_below_their_folder(name, inside):
    assert bounds.is_inside(name) is inside


def test_a_tree_of_files_has_a_size_and_nothing_else_in_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(bytes(5))
    (tmp_path / "d").write_bytes(bytes(6))
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert bounds.check_tree(tmp_path) == 11
    with pytest.raises(OSError, match="more than 2 files"):
        bounds.check_tree(tmp_path, max_files=2)
    os.mkfifo(tmp_path / "a" / "e")
    with pytest.raises(OSError, match="it is a FIFO, not a file"):
        bounds.check_tree(tmp_path)


def test_growth_is_bounded():
    bounds.check_growth(10**9, 10**10)
    with pytest.raises(ValueError, match="x: 5 bytes that would become 1,000,000,000"):
        bounds.check_growth(5, 10**9, "x")


def test_arrays_of_an_archive_are_bounded_together():
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(5))
    stream.seek(0)
    with bounds.open_npz(stream) as arrays:
        assert arrays["a"].tolist() == [0, 1, 2, 3, 4]
    with (
        pytest.raises(ValueError, match="expected 50 at most"),
        bounds.open_npz(stream, max_bytes=50),
    ):
        pass
    with pytest.raises(ValueError, match="not a whole zip archive"), bounds.open_npz(io.BytesIO()):
        pass
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.npy", b"none")
    with pytest.raises(ValueError, match="magic"), bounds.open_npz(stream):
        pass
