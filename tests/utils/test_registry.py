# SPDX-License-Identifier: Apache-2.0
"""Config sections become keyword arguments, or one clear line."""

from typing import Literal

import pytest

from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import bind, check_type, lookup


def shape(*, width: int, color: Literal["red", "blue"] = "red", scale: float | None = None):
    """A constructor."""


def draw(*, line: Literal["none", "thin"] | str = "thin", fill: Literal["none"] | None = "none"):
    """A constructor with choices that are called none."""


def paint(*, layers: int = 1):
    """Another one that shares the section."""


def test_defaults_are_filled_in_and_each_constructor_gets_its_own():
    shaped, painted = bind({"width": 2, "layers": 3}, shape, paint, key="it")
    assert shaped == {"width": 2, "color": "red", "scale": None}
    assert painted == {"layers": 3}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "it.width is missing"),
        ({"width": 1, "wdth": 2}, "unknown config key it.wdth; did you mean 'width'?"),
        ({"width": 1.5}, "it.width=1.5 is a float; expected int"),
        ({"width": True}, "it.width=True is a bool; expected int"),
        ({"width": 1, "color": "green"}, "it.color='green' is a str; expected 'red' or 'blue'"),
        ({"width": 1, "scale": "big"}, "it.scale='big' is a str; expected float or None"),
    ],
)
def test_what_does_not_fit_is_refused(section, message):
    with pytest.raises(UserError) as error:
        bind(section, shape, paint, key="it")
    assert str(error.value).startswith(message)


def test_a_bare_none_is_the_choice_of_that_name_unless_none_fits():
    assert bind({"line": None, "fill": None}, draw, key="it") == [{"line": "none", "fill": None}]
    with pytest.raises(UserError, match=r"it.color=None is a NoneType; expected 'red' or 'blue'"):
        bind({"width": 1, "color": None}, shape, key="it")


def test_a_key_that_the_caller_gives_is_not_for_the_config():
    with pytest.raises(UserError, match=r"unknown config key it\.width"):
        bind({"width": 1}, shape, key="it", given=("width",))


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (1, float),
        ((1, 2), tuple[int, int]),
        ([1, 2], int | tuple[int, int]),
        (None, str | None),
        ((), tuple[str, ...]),
        (("a", "b", "c"), tuple[str, ...]),
        (["a"], tuple[str, ...]),
        ((1, None), tuple[int | None, ...]),
        ((("a", 1.0), ("b", 2)), tuple[tuple[str, float], ...]),
        ([["a", 1.0]], tuple[tuple[str, float], ...]),
    ],
)
def test_values_that_fit(value, annotation):
    check_type(value, annotation, key="it")


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ((1, 2, 3), tuple[int, int]),
        ("1", int),
        (1, str),
        (True, float),
        ("abc", tuple[str, ...]),
        (("a", 1), tuple[str, ...]),
        ((True,), tuple[float, ...]),
        (("a", 1.0), tuple[tuple[str, float], ...]),
        ((("a", 1.0, 2.0),), tuple[tuple[str, float], ...]),
        ((("a", "1"),), tuple[tuple[str, float], ...]),
        ({"a": 1.0}, tuple[tuple[str, float], ...]),
    ],
)
def test_values_that_do_not_fit(value, annotation):
    with pytest.raises(UserError, match="it="):
        check_type(value, annotation, key="it")


def test_unknown_name_lists_what_there_is():
    with pytest.raises(UserError, match=r"model\.name='zzz' is unknown; there is: mixer, vit"):
        lookup({"vit": 1, "mixer": 2}, "zzz", key="model.name")
