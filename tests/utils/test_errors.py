# SPDX-License-Identifier: Apache-2.0
import pytest

from vit_jax.utils.errors import UserError, describe_error, first_line, name_key


def test_an_exception_is_described_in_one_line():
    assert describe_error(ValueError("one\n  two")) == "ValueError: one two"


def test_a_long_message_is_cut():
    assert len(describe_error(ValueError("x" * 10_000))) == 400


@pytest.mark.parametrize(
    ("message", "expected"), [("one\ntwo", "one"), ("\none", "one"), ("", "ValueError")]
)
def test_the_first_line_of_a_message_or_else_the_type(message, expected):
    assert first_line(ValueError(message)) == expected


@pytest.mark.parametrize("message", ["none: there is no such file", "there is no such file"])
def test_a_key_is_named_with_its_value_once(message):
    error = name_key("init_from", "none", UserError(message))
    assert str(error) == "init_from='none': there is no such file"
