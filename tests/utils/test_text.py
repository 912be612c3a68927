# SPDX-License-Identifier: Apache-2.0
"""Names from outside as text that is printed and written."""

import os

import pytest

from vit_jax.utils.text import describe_size, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b_ü_日本_👩\u200d🔬", "a b_ü_日本_👩\u200d🔬"),
        (r"C:\new", r"C:\new"),
        ("a\nvit_jax: error: b", r"a\nvit_jax: error: b"),
        ("\x1b[2J\x1b]0;x\x07", r"\x1b[2J\x1b]0;x\x07"),
        ("a\r\tb\x85\u2028", r"a\r\tb\x85\u2028"),
        ("\u202egnp.a", r"\u202egnp.a"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("\ud800", r"\ud800"),
        (5, "5"),
    ],
)
def test_what_breaks_a_line_or_has_no_utf8_is_an_escape(text, expected):
    found = printable(text)
    assert found == expected
    assert printable(found) == found
    assert len(found.encode().splitlines()) == 1


def test_line_breaks_of_a_whole_file_can_be_kept():
    assert printable("a\n\x1bb\n", keep="\n") == "a\n\\x1bb\n"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 kB"),
        (312, "0.3 kB"),
        (70_000, "70.0 kB"),
        (2**20, "1.0 MiB"),
        (3 * 2**30, "3.0 GiB"),
    ],
)
def test_sizes_have_a_unit_in_which_they_are_not_zero(size, text):
    assert describe_size(size) == text
