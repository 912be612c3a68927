# SPDX-License-Identifier: Apache-2.0
"""Texts such as `resize(224, method='area')`: a name and arguments that are literals."""

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import check_type, import_part, is_part
from vit_jax.utils.suggestions import suggest


def parse_call(
    text: str,
    table: Mapping[str, Any],
    *,
    key: str,
    what: str,
    elsewhere: Mapping[str, str] | None = None,
    gives: tuple[Any, ...] = (Callable,),
) -> Any:
    """Calls the constructor that a text names, with the arguments in it.

    Numbers must be finite and positive, or 0 for arguments in the constructor's `may_be_zero`.

    Args:
      text: `name` or `name(argument, name=argument)`; the name may be that of a part from outside.
      table: constructors by name.
      key: the config key of the text, for errors.
      what: the constructor makes, for errors.
      elsewhere: names that are not in the table, and what to use for them.
      gives: the classes of which one must be that of what a part from outside makes.

    Raises:
      UserError: an unknown name or a wrong argument; the error quotes the text.
    """
    name, parenthesis, arguments = text.partition("(")
    outside = is_part(name)
    try:
        node = ast.parse(f"f{parenthesis}{arguments}" if outside else text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        node = None
    call = node if isinstance(node, ast.Call) else None
    func = call.func if call else node
    if not isinstance(func, ast.Name):
        raise UserError(
            f"{key}: can't read {text!r}: expected NAME or NAME(argument, name=argument)"
        )
    name = name if outside else func.id
    if outside:
        make = import_part(name, key=key, gives=gives)
    elif elsewhere and name in elsewhere:
        raise UserError(f"{key}: {text!r} is not {_an(what)} here: {elsewhere[name]}")
    elif name not in table:
        raise UserError(f"{key}: unknown {what} {name!r}{suggest(name, table)}")
    else:
        make = table[name]
    signature = inspect.signature(make)
    try:
        bound = _bind(signature, call)
    except (TypeError, ValueError, RecursionError, MemoryError):
        usage = [str(p.replace(annotation=p.empty)) for p in signature.parameters.values()]
        expected = f"expected {name}({', '.join(usage)})"
        if "features" in signature.parameters and outside:
            expected = "expected a function of the arguments here, which returns the operation"
        raise UserError(f"{key}: wrong arguments in {text!r}: {expected}") from None
    for argument, value in bound.arguments.items():
        parameter = signature.parameters[argument]
        annotation = parameter.annotation
        if parameter.kind is parameter.VAR_POSITIONAL:
            annotation = tuple[annotation, ...]
        check_type(value, annotation, key=f"{key}: {name}: {argument}")
        _check_sign(value, argument, make, where=f"{key}: {text!r}")
    try:
        return make(*bound.args, **bound.kwargs)
    except ValueError as e:
        raise UserError(f"{key}: {text!r}: {e}") from None


def _an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _bind(signature: inspect.Signature, call: ast.Call | None) -> inspect.BoundArguments:
    if call is None:
        return signature.bind()
    args = [ast.literal_eval(a) for a in call.args]
    kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    if len(kwargs) < len(call.keywords):
        raise TypeError("an argument is given twice")
    return signature.bind(*args, **kwargs)


def _check_sign(value: Any, argument: str, make: Any, *, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):  # As 1e999 is read.
        raise UserError(f"{where}: {argument}={value}: expected a finite number")
    if not hasattr(make, "may_be_zero"):  # A function outside of this package.
        return
    if argument in make.may_be_zero and value < 0:
        raise UserError(f"{where}: {argument}={value}: expected 0 or more")
    if argument not in make.may_be_zero and value <= 0:
        raise UserError(f"{where}: {argument}={value}: expected more than 0")
