# SPDX-License-Identifier: Apache-2.0
"""Config sections become keyword arguments, or one clear line."""

import dataclasses
from typing import Literal

import pytest

from vit_jax.utils import registry
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import (
    bind,
    check_type,
    find_part,
    find_parts,
    is_part,
    keywords,
    lookup,
    trust_parts,
)


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
        ({"width": 1, "wdth": 2}, "unknown config key it.wdth; did you mean '--config.it.width'?"),
        ({"width": 1.5}, "it.width=1.5 is a float; expected int"),
        ({"width": True}, "it.width=True is a bool; expected int"),
        ({"width": 1, "color": "green"}, "it.color='green': expected 'red' or 'blue'"),
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


# What is in a module of a user.
OUTSIDE = """
from __future__ import annotations
import dataclasses
import os
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from nowhere import Unknown

NUMBER = 3

def make_box(*, width: int, color: str = "red", fill=os.getcwd):
    return {"width": width, "color": color}

def make_line(length: int, style: Unknown = None):
    return (length, style)

@dataclasses.dataclass
class Dot:
    size: int = 1

    hidden = "a class attribute"

def fails(*, why: str = "no"):
    raise ValueError(f"because\\n{why}")

def fails_elsewhere():
    return dataclasses.fields(3)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The folder of a module that nobody has named yet."""
    monkeypatch.setattr(registry, "_trusted", set())
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "registry_parts.py").write_text(OUTSIDE)
    return tmp_path


def find(name, **options):
    return find_part({"box": lookup}, name, key="model.name", **options)


def refuse(name, *, key="model.name"):
    with pytest.raises(UserError) as error:
        find_part({}, name, key=key)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["m:f", "my_models:make_vit", "a.b.c:D"])
def test_names_of_parts(name):
    assert is_part(name)
    assert find_parts(f"decode|{name}(3)|keep('image')") == [name]


@pytest.mark.parametrize(
    "name",
    [
        *("vit", "folder:/data", "folder:../x", "blank:10", "augreg:B/16", "mnist:3.*.*"),
        *("mnist/config:1.0.0", "a:b-c", "a:", ":b", "a:b:c", "a.:b", ".a:b", "a b:c", "a:b.c"),
        None,
        3,
    ],
)
def test_other_names_are_not_those_of_parts(name):
    assert not is_part(name)


def test_a_module_is_imported_only_if_the_user_named_it(outside):
    mark = outside / "imported"
    (outside / "registry_parts.py").write_text(f"open({str(mark)!r}, 'w')")
    message = refuse("registry_parts:make_box")
    assert message == (
        "model.name='registry_parts:make_box' is named by a file only: add --parts=registry_parts "
        "to import it (in Python, parts=['registry_parts'])"
    )
    assert not mark.exists()


def test_trust_in_a_package_is_trust_in_its_modules_and_not_the_other_way_round(outside):
    for name in ("boxes", "boxes_too"):
        (outside / name).mkdir()
        (outside / name / "__init__.py").touch()
        (outside / name / "square.py").write_text(OUTSIDE)
    trust_parts("boxes.square")
    assert "--parts=boxes.round" in refuse("boxes.round:make_box")
    assert "--parts=boxes_too.square" in refuse("boxes_too.square:make_box")
    assert find("boxes.square:make_box")(width=1) == {"width": 1, "color": "red"}
    trust_parts(["boxes_too:anything"])
    assert find("boxes_too.square:make_box")(width=1) == {"width": 1, "color": "red"}


def test_a_part_is_checked_like_a_built_in_constructor(outside):
    trust_parts("others, registry_parts")
    make = find("registry_parts:make_box")
    assert bind({"width": 2}, make, key="it") == [{"width": 2, "color": "red"}]
    with pytest.raises(UserError) as error:
        bind({"widht": 2}, make, key="it")
    expected = (
        "unknown config key it.widht (registry_parts:make_box); did you mean '--config.it.width'?"
    )
    assert str(error.value) == expected
    with pytest.raises(UserError, match=r"it\.width \(registry_parts:make_box\) is missing"):
        bind({}, make, key="it")
    with pytest.raises(UserError, match=r"it\.width='a' is a str; expected int \(registry_parts:"):
        bind({"width": "a"}, make, key="it")


@pytest.mark.parametrize("argument", ["name", "layers"])
def test_an_argument_with_the_name_of_another_key_is_refused(outside, argument):
    module = f"registry_reserves_{argument}"
    (outside / f"{module}.py").write_text(f"def make(*, {argument}=3): pass\n")
    trust_parts(module)
    make = find(f"{module}:make")
    with pytest.raises(UserError) as error:
        bind({}, paint, make, key="it")
    assert str(error.value) == (
        f"it.{argument} is reserved: {module}:make needs another name for its argument {argument}"
    )
    given = bind({}, paint, make, key="it", given=("name", "layers"))
    assert given == [{}, {}]


def test_plain_functions_and_dataclasses_are_parts_too(outside):
    trust_parts("registry_parts")
    line, dot = find("registry_parts:make_line"), find("registry_parts:Dot")
    assert bind({"length": 2}, line, key="it") == [{"length": 2, "style": None}]
    assert line(length=2, style="any") == (2, "any")
    assert bind({}, dot, key="it") == [{"size": 1}]
    assert dot.hidden == "a class attribute"
    assert dataclasses.asdict(dot(size=3)) == {"size": 3}


def test_a_default_that_a_config_does_not_give_back_is_left_to_the_constructor(outside):
    trust_parts("registry_defaults")
    (outside / "registry_defaults.py").write_text(
        "import enum, math\n"
        "class Kind(enum.IntEnum):\n    A = 1\n"
        "class Word(str, enum.Enum):\n    A = 'a'\n"
        "def make(a={'f': print}, b=Kind.A, c=Word.A, d=math.nan, e=({'g': [math.nan]},),\n"
        "         f={1: 2}, g=math.inf, h={'k': (1, {'l': None})}, i='text'): pass\n"
    )
    assert bind({}, find("registry_defaults:make"), key="it") == [
        {"g": float("inf"), "h": {"k": (1, {"l": None})}, "i": "text"}
    ]


def test_a_flax_module_has_its_own_fields(outside):
    trust_parts("registry_flax")
    code = "import flax.linen as nn\nclass Net(nn.Module):\n    width: int\n"
    (outside / "registry_flax.py").write_text(code)
    assert list(keywords(find("registry_flax:Net"))) == ["width"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("registry_none:make", "there is no module registry_none: expected it to be installed"),
        ("registry_part:make", "or its folder in PYTHONPATH; did you mean 'registry_parts'?"),
        ("registry_parts.sub:make", "there is no module registry_parts.sub"),
        ("registry_parts:make_bix", "registry_parts has no make_bix; did you mean 'make_box'?"),
        ("registry_parts:NUMBER", "is an int; expected a function or a class"),
        ("registry_syntax:make", "(registry_syntax.py:2)"),
        ("registry_syntax:make", "registry_syntax fails: SyntaxError: "),
        ("registry_raises:make", "fails: ZeroDivisionError: division by zero (registry_raises.py"),
        ("registry_needs:make", "registry_needs fails: ModuleNotFoundError: No module named 'nop'"),
        ("registry_exits:make", "registry_exits fails: SystemExit: 3"),
    ],
)
def test_what_can_not_be_imported_is_one_line(outside, name, message):
    (outside / "registry_syntax.py").write_text("\ndef make(:\n")
    (outside / "registry_raises.py").write_text("\n1 / 0\n")
    (outside / "registry_needs.py").write_text("import nop\n")
    (outside / "registry_exits.py").write_text("import sys\nsys.exit(3)\n")
    trust_parts(name)
    line = refuse(name)
    assert line.startswith(f"model.name={name!r}")
    assert message in line


def test_an_error_in_a_part_is_one_line_with_its_place(outside):
    trust_parts("registry_parts")
    with pytest.raises(UserError) as error:
        find("registry_parts:fails")(why="so")
    line = "'registry_parts:fails' failed with ValueError: because so (registry_parts.py:24)"
    assert str(error.value) == f"model.name={line}"
    with pytest.raises(UserError, match=r"TypeError: .* \(registry_parts\.py:27\)"):
        find("registry_parts:fails_elsewhere")()
    with pytest.raises(UserError, match=r"gives a dict; expected builtins\.int or builtins\.float"):
        find("registry_parts:make_box", gives=(int, float))(width=1)


def test_built_in_names_come_first_and_unknown_ones_list_what_there_is(outside):
    assert find("box") is lookup
    with pytest.raises(UserError, match=r"model\.name='bax' is unknown; did you mean 'box'"):
        find("bax")
    with pytest.raises(UserError, match=r"unknown; did you mean 'my\.models:Net'\?$"):
        find("my.models.Net")
