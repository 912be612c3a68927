# SPDX-License-Identifier: Apache-2.0
"""Names from outside as text that is printed and written."""

import os

import pytest

from vit_jax.utils.text import printable


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
