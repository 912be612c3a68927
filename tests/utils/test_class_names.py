# SPDX-License-Identifier: Apache-2.0
"""Files of class names are read as whatever program wrote them."""

import unicodedata

import pytest

from vit_jax.utils.class_names import check_names, format_names, normalize_name, read_names
from vit_jax.utils.errors import UserError

NAMES = ("Käfer", "café au lait", "naïve", "0")
TEXT = format_names(NAMES)


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.rstrip("\n").encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode("utf-8-sig"),
        f"{TEXT}\n  \n".encode(),
        unicodedata.normalize("NFD", TEXT).encode(),
    ],
    ids=["unix", "no last end", "mark", "utf-16", "windows", "old mac", "empty end", "nfd"],
)
def test_each_line_is_a_name_however_lines_end(content, tmp_path, caplog):
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    with caplog.at_level("INFO", "vit_jax"):
        assert read_names(file, key="k") == NAMES
    assert not caplog.records


def test_a_file_in_latin_1_is_read_and_that_is_logged(tmp_path, caplog):
    file = tmp_path / "names.txt"
    for encoding in ("latin-1", "cp1252"):
        caplog.clear()
        file.write_bytes(TEXT.encode(encoding))
        with caplog.at_level("INFO", "vit_jax"):
            assert read_names(file, key="--labels=names.txt") == NAMES
        (record,) = caplog.records
        assert record.message.startswith("--labels=names.txt is not in UTF-8: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"cat\n\ndog\n", "k: line 2 is empty"),
        (b"cat\n\x00\x01\n", "k: line 2 is no text"),
    ],
)
def test_a_file_that_would_shift_names_is_refused(content, words, tmp_path):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_names(tmp_path / "names.txt", key="k")


def test_what_no_file_or_terminal_takes_is_escaped():
    assert normalize_name("caf\udce9") == "caf\\xe9"
    assert normalize_name("\x1b[31mred") == "\\x1b[31mred"
    assert normalize_name("a\nb") == "a\nb"


def test_an_empty_file_has_no_names(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbf\n")
    assert read_names(tmp_path / "names.txt", key="k") == ()
    with pytest.raises(UserError, match="k can't be read: No such file"):
        read_names(tmp_path / "none.txt", key="k")


def test_names_in_json_are_texts():
    assert check_names(None, "x") is None
    assert check_names(["a", unicodedata.normalize("NFD", "é")], "x") == ("a", "é")
    for bad in ("cat", [1], {"0": "cat"}, 3):
        with pytest.raises(UserError, match=r"x: class_names=.*expected a list of texts"):
            check_names(bad, "x")
