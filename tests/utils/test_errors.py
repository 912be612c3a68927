# SPDX-License-Identifier: Apache-2.0
import pytest

from vit_jax.utils.errors import describe_error, first_line


def test_an_exception_is_described_in_one_line():
    assert describe_error(ValueError("one\n  two")) == "ValueError: one two"


def test_a_long_message_is_cut():
    assert len(describe_error(ValueError("x" * 10_000))) == 400


@pytest.mark.parametrize(
    ("message", "expected"), [("one\ntwo", "one"), ("\none", "one"), ("", "ValueError")]
)
def test_the_first_line_of_a_message_or_else_the_type(message, expected):
    assert first_line(ValueError(message)) == expected
