# SPDX-License-Identifier: Apache-2.0
"""Turns config sections into arguments of constructors.

A config section holds the keyword arguments of one constructor (or of two that share the section)
and `name`. So the signature of the constructor is the only list of keys and defaults, and its
annotations define which values fit. All else is an error that names the key.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.utils.errors import UserError, suggest

# Fields that Flax adds to every module.
_FLAX_FIELDS = {"parent", "name"}


def lookup(table: Mapping[str, Any], name: Any, *, key: str) -> Any:
    """Returns `table[name]`; an unknown name is a `UserError` that suggests the nearest one."""
    if not isinstance(name, str) or name not in table:
        raise UserError(f"{key}={name!r} is unknown{suggest(str(name), table)}")
    return table[name]


def keywords(fn: Callable) -> dict[str, inspect.Parameter]:
    """Returns the parameters of `fn` that a config may set: the keyword-only ones."""
    parameters = inspect.signature(fn).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


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
      key: path of the section in the config, for errors.
      given: parameters that the caller passes, and a config may not set.

    Returns:
      A list with one dict for each constructor, with defaults, as in the resolved config.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type.
    """
    allowed: dict[str, inspect.Parameter] = {}
    for fn in fns:
        allowed |= {n: p for n, p in keywords(fn).items() if n not in given}
    values = {}
    for name, value in section.items():
        if name not in allowed:
            raise UserError(f"unknown config key {key}.{name}{suggest(name, allowed)}")
        annotation = allowed[name].annotation
        # The command line turns none into None, which here means the choice of that name.
        if value is None and not _fits(None, annotation) and "none" in _literals(annotation):
            value = "none"
        check_type(value, annotation, key=f"{key}.{name}")
        values[name] = value
    bound = []
    for fn in fns:
        kwargs = {}
        for name, parameter in keywords(fn).items():
            if name in given:
                continue
            if name not in section and parameter.default is parameter.empty:
                raise UserError(f"{key}.{name} is missing, and has no default")
            kwargs[name] = values.get(name, parameter.default)
        bound.append(kwargs)
    return bound


def check_type(value: Any, annotation: Any, *, key: str) -> None:
    """Raises `UserError` unless a value fits a simple annotation.

    Examples of such are str, int | None, Literal["a", "b"], tuple[int, int] and tuple[str, ...]. A
    list fits a tuple, since JSON and the command line have only lists.
    """
    if _fits(value, annotation):
        return
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    names = " or ".join("None" if m is types.NoneType else _type_name(m) for m in members)
    raise UserError(f"{key}={value!r} is a {type(value).__name__}; expected {names}")


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
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or annotation)
