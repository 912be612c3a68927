# SPDX-License-Identifier: Apache-2.0
"""Turns config sections into arguments of constructors.

A config section holds the keyword arguments of one constructor (or of two that share the section)
and `name`. So the signature of the constructor is the only list of keys and defaults, and its
annotations define which values fit. All else is an error that names the key.

A name with a colon, `my_package.my_module:make_thing`, is a constructor outside of this package. It
is imported where a built-in name is looked up, and only if the user named its module too.
"""

import contextlib
import importlib
import inspect
import pkgutil
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.utils.errors import UnknownKeyError, UserError, describe_error
from vit_jax.utils.suggestions import find_near, suggest, suggest_key
from vit_jax.utils.text import describe_type

# Fields that Flax adds to every module.
_FLAX_FIELDS = {"parent", "name"}


def lookup(table: Mapping[str, Any], name: Any, *, key: str) -> Any:
    """Returns `table[name]`; an unknown name is a `UserError` that suggests the nearest one."""
    if not isinstance(name, str) or name not in table:
        raise UserError(f"{key}={name!r} is unknown{suggest(str(name), table)}")
    return table[name]


# A dotted module, a colon and the name of one of its attributes.
_PART = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")
# Not the end of a path.
_IN_TEXT = re.compile(rf"(?<![^\s|,'\"(\[])(?:{_PART.pattern})(?!\w)")

_trusted: set[str] = set()


class Part:
    """A constructor that was imported by its name, which its errors quote.

    Its attributes and its signature are those of what was imported.

    Args:
      make: the function or class.
      name: `module:attribute`.
      key: the config key with the name, for errors.
      gives: the classes of which one must be that of its results; none for any.
    """

    def __init__(self, make: Callable, *, name: str, key: str, gives: tuple[Any, ...] = ()):
        self.imported, self._name, self._gives = make, name, gives
        self._where = f"{key}={name!r}"
        try:
            self.__signature__ = _read_signature(make)
        except (TypeError, ValueError) as e:
            raise UserError(f"{self._where} can't be called by name: {e}") from None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with report_failure(self._where, self._name):
            made = self.imported(*args, **kwargs)
        if self._gives and not isinstance(made, self._gives):
            expected = " or ".join(f"{c.__module__}.{c.__qualname__}" for c in self._gives)
            raise UserError(f"{self._where} gives {describe_type(made)}; expected {expected}")
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.imported, name)

    def __str__(self) -> str:
        return self._name


def is_part(name: Any) -> bool:
    """Whether a name is that of a constructor outside of this package: `module:attribute`."""
    return isinstance(name, str) and _PART.fullmatch(name) is not None


def find_parts(text: str) -> list[str]:
    """The names `module:attribute` in a text, such as a line of preprocessing or a list."""
    return _IN_TEXT.findall(text)


def trust_parts(modules: Iterable[str] | str) -> None:
    """Allows to import modules, and modules inside these if they are packages.

    A file never makes code run. A config of a workdir and what a checkpoint describes are files
    that others may have written, so the modules that they name are imported only if the user named
    them too: in their own config, or by `--parts`. What they named is kept here for the whole
    process, because names are looked up in many places that know nothing of their origin, such as
    lines of preprocessing in the threads of a loader. A place that was forgotten refuses a name,
    and does not import it.

    Args:
      modules: dotted names, or `module:attribute`; a text may hold several, separated by commas.
    """
    if not isinstance(modules, Iterable):
        raise UserError(f"parts={modules!r}: expected the names of modules, such as my_models")
    names = modules.split(",") if isinstance(modules, str) else modules
    _trusted.update(name.partition(":")[0].strip() for name in names)


def import_part(name: str, *, key: str, gives: tuple[Any, ...] = ()) -> Part:
    """Imports `module:attribute`.

    Args:
      name: of the part, for which `is_part` holds.
      key: the config key with the name, for errors.
      gives: see `Part`.

    Raises:
      UserError: the user did not name the module, it can't be imported, or has no such callable.
    """
    module, _, attribute = name.partition(":")
    where = f"{key}={name!r}"
    parents = module.split(".")
    if _trusted.isdisjoint(".".join(parents[:n]) for n in range(1, len(parents) + 1)):
        raise UserError(
            f"{where} is named by a file only: add --parts={module} to import it (in Python, "
            f"parts=[{module!r}])"
        )
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module}.".startswith(f"{e.name}."):
            raise UserError(
                f"{where}: {module} fails: {describe_error(e)}{_find_line(e, name)}"
            ) from e
        near = find_near(module, [found.name for found in pkgutil.iter_modules()])
        raise UserError(
            f"{where}: there is no module {e.name}: expected it to be installed, or its folder in "
            "PYTHONPATH" + (f"; did you mean {near!r}?" if near else "")
        ) from e
    except (Exception, SystemExit) as e:
        raise _import_error(where, name, e) from e
    make = getattr(imported, attribute, None)
    if make is None:
        own = [n for n, x in vars(imported).items() if getattr(x, "__module__", "") == module]
        raise UserError(f"{where}: {module} has no {attribute}{suggest(attribute, own)}")
    if not callable(make):
        raise UserError(f"{where} is {describe_type(make)}; expected a function or a class")
    return Part(make, name=name, key=key, gives=gives)


def _import_error(where: str, name: str, error: BaseException) -> UserError:
    module = name.partition(":")[0]
    return UserError(f"{where}: {module} fails: {describe_error(error)}{_find_line(error, name)}")


def find_part(table: Mapping[str, Any], name: Any, *, key: str, gives: tuple[Any, ...] = ()) -> Any:
    """A constructor: that of a built-in name, or an imported one if the name has a colon.

    Args:
      table: the built-in constructors by name.
      name: of the constructor.
      key: the config key with the name, for errors.
      gives: see `Part`.

    Raises:
      UserError: an unknown name; see `import_part` for others.
    """
    if is_part(name) and name not in table:
        return import_part(name, key=key, gives=gives)
    with_colon = ":".join(str(name).rsplit(".", 1))
    if is_part(with_colon):
        raise UserError(f"{key}={name!r} is unknown; did you mean {with_colon!r}?")
    return lookup(table, name, key=key)


def _read_signature(make: Callable) -> inspect.Signature:
    try:
        return inspect.signature(make, eval_str=True)
    except Exception:  # An annotation that only type checkers can evaluate.
        return inspect.signature(make)


@contextlib.contextmanager
def report_failure(where: str, name: str) -> Iterator[None]:
    """Turns an exception of a part's code into a `UserError` that names its file and line.

    Args:
      where: start of the error, such as `model.name='my_models:Net'`.
      name: of the part, `module:attribute`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{where} failed with {describe_error(e)}{_find_line(e, name)}") from e


def _find_line(error: BaseException, name: str) -> str:
    """The file and line of a part's code that raised, in parentheses; empty if it is not known.

    This is the last line in the part's own package, or the last one of all if none is in it.
    """
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f" ({Path(error.filename).name}:{error.lineno})"
    machinery = (__file__, contextlib.__file__, importlib.__file__)
    frames = [
        (f.filename, f.lineno)
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename not in machinery and not f.filename.startswith("<")
    ]
    top = sys.modules.get(re.split("[.:]", name)[0])
    places = {*getattr(top, "__path__", ()), getattr(top, "__file__", None)} - {None}
    own = [f for f in frames if places & {f[0], *map(str, Path(f[0]).parents)}]
    return "".join(f" ({Path(file).name}:{line})" for file, line in (own or frames)[-1:])


def keywords(fn: Callable) -> dict[str, inspect.Parameter]:
    """Returns the parameters of `fn` that a config may set: the keyword-only ones.

    Those of a `Part` may be positional too, as in dataclasses and Flax modules.
    """
    kinds = [inspect.Parameter.KEYWORD_ONLY]
    if isinstance(fn, Part):
        kinds.append(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = {p.name: p for p in inspect.signature(fn).parameters.values() if p.kind in kinds}
    if isinstance(fn, Part) and found.keys() >= _FLAX_FIELDS:
        found = {name: p for name, p in found.items() if name not in _FLAX_FIELDS}
    return found


def takes_options_of(target: Callable) -> Callable[[Callable], Callable]:
    """Decorates a function that passes its `**options` to a dataclass or another constructor.

    Its signature then has the keyword-only parameters of `target` in their place, so that a config
    may set them and their defaults are defined once.
    """

    def decorate(fn: Callable) -> Callable:
        signature = inspect.signature(fn)
        own = {n: p for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        taken = own.keys() | _FLAX_FIELDS
        options = [p for n, p in keywords(target).items() if n not in taken]
        fn.__signature__ = signature.replace(parameters=[*own.values(), *options])
        return fn

    return decorate


def bind(section: Mapping[str, Any], *fns: Callable, key: str, given: tuple[str, ...] = ()):
    """Splits a config section into one dict of keyword arguments for each of `fns`.

    Args:
      section: of the config, without `name`.
      *fns: constructors whose keyword-only parameters are the allowed keys.
      key: path of the section in the config, for errors; empty for the whole config.
      given: parameters that the caller passes, and a config may not set.

    Returns:
      A list with one dict for each constructor, with defaults, as in the resolved config. A
      default that no config can hold, such as a function, is left to the constructor.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type.
    """
    allowed: dict[str, inspect.Parameter] = {}
    for fn in fns:
        _check_reserved(fn, fns, key=key, given=given)
        allowed |= {n: p for n, p in keywords(fn).items() if n not in given}
    part = "".join(f" ({fn})" for fn in fns if isinstance(fn, Part))
    values = {}
    for name, value in section.items():
        where = join_keys(key, name)
        if name not in allowed:
            below = _find_leaf(value)
            raise UnknownKeyError(
                f"unknown config key {join_keys(where, *below)}{part}",
                key=where,
                below=below,
                allowed=allowed,
                suggestion=suggest_key(where, allowed, below=below),
            )
        annotation = allowed[name].annotation
        # The command line turns none into None, which here means the choice of that name.
        if value is None and not _fits(None, annotation) and "none" in _literals(annotation):
            value = "none"
        try:
            check_type(value, annotation, key=where)
        except UserError as e:
            raise UserError(f"{e}{part}") from None
        values[name] = value
    bound = []
    for fn in fns:
        kwargs = {}
        for name, parameter in keywords(fn).items():
            if name in given:
                continue
            if name not in section and parameter.default is parameter.empty:
                raise UserError(f"{join_keys(key, name)}{part} is missing, and has no default")
            if name in values or _is_plain(parameter.default):
                kwargs[name] = values.get(name, parameter.default)
        bound.append(kwargs)
    return bound


def join_keys(*keys: str) -> str:
    """Joins keys with dots; the key of the whole config is empty."""
    return ".".join(filter(None, keys))


def _find_leaf(value: Any) -> tuple[str, ...]:
    """The keys that lead to the first value within a section; empty for a value itself."""
    if not isinstance(value, Mapping) or not value:
        return ()
    name = next(iter(value))
    return (str(name), *_find_leaf(value[name]))


def _check_reserved(fn: Callable, fns: tuple[Callable, ...], *, key: str, given: tuple[str, ...]):
    """Raises `UserError` if an argument of a part is another key of its section."""
    others = [keywords(other).keys() for other in fns if other is not fn]
    reserved = {"name"}.union(*others).intersection(keywords(fn)).difference(given)
    if isinstance(fn, Part) and reserved:
        first = min(reserved)
        raise UserError(
            f"{key}.{first} is reserved: {fn} needs another name for its argument {first}"
        )


def _is_plain(value: Any) -> bool:
    """Whether a config can hold a value, and gives an equal one when it is read from JSON."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) for k in value) and all(map(_is_plain, value.values()))
    # Not a subclass, such as an enum, nor NaN, which differs from itself.
    return value is None or (type(value) in (bool, int, float, str) and value == value)


def check_type(value: Any, annotation: Any, *, key: str) -> None:
    """Raises `UserError` unless a value fits a simple annotation.

    Examples of such are str, int | None, Literal["a", "b"], tuple[int, int] and tuple[str, ...]. A
    list fits a tuple, since JSON and the command line have only lists.
    """
    if _fits(value, annotation):
        return
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    names = " or ".join("None" if m is types.NoneType else _type_name(m) for m in members)
    words = [c for c in _literals(annotation) if isinstance(c, str)]
    is_word = bool(words) and isinstance(value, str)
    near = find_near(value, words) if is_word else None
    hint = "" if near is None else f"; did you mean {near!r}?"
    # A wrong word among words is not of a wrong type.
    found = ":" if is_word else f" is {describe_type(value)};"
    raise UserError(f"{key}={value!r}{found} expected {names}{hint}")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _literals(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if _is_union(annotation):
        return tuple(x for member in typing.get_args(annotation) for x in _literals(member))
    return ()


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(annotation)))
    return str(annotation) if typing.get_origin(annotation) else annotation.__name__


def _fits(value: Any, annotation: Any) -> bool:
    if annotation is Any or annotation is inspect.Parameter.empty:
        return True
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(annotation):
        return any(_fits(value, member) for member in members)
    if origin is typing.Literal:
        return value in members
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if members[1:] == (...,):
            members = members[:1] * len(value)
        return len(value) == len(members) and all(map(_fits, value, members))
    if not isinstance(origin or annotation, type):
        return True  # An alias of a library, or an annotation that could not be evaluated.
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or annotation)
