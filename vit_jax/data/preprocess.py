# SPDX-License-Identifier: Apache-2.0
"""Preprocessing as one readable line: `decode|inception_crop(224)|flip_lr`."""

import ast
import inspect
import math
from collections.abc import Callable
from typing import Any

from vit_jax.data.ops import policies, transforms
from vit_jax.data.ops.transforms import Op
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import check_type, import_part, is_part
from vit_jax.utils.suggestions import suggest

OPS = transforms.OPS | policies.OPS

# Operations of other projects that this one does not run on the host.
_PIXELS = "images stay uint8 up to the device; set objective.pixel_mean and objective.pixel_std"
_LABELS = "labels become one-hot on the device, by the objective"
_ELSEWHERE = {
    "normalize": _PIXELS,
    "value_range": _PIXELS,
    "vgg_value_range": _PIXELS,
    "one_hot": _LABELS,
    "onehot": _LABELS,
    "random_erasing": "it runs on the device; set objective.random_erasing",
    "mixup": "it runs on the device; set objective.mixup",
    "cutmix": "it runs on the device; set objective.cutmix",
}


def parse_preprocess(text: str, *, key: str) -> tuple[Op, ...]:
    """Turns `op(args)|op|...` into operations. Arguments are literals; nothing is evaluated.

    Args:
      text: operations in the order in which they run.
      key: the config key of the text, for errors.

    Raises:
      UserError: an unknown operation or argument; the error quotes the operation.
    """
    return tuple(_parse_op(part.strip(), key=key) for part in text.split("|"))


def _parse_op(text: str, *, key: str) -> Op:
    name, parenthesis, arguments = text.partition("(")
    outside = is_part(name)
    try:
        node = ast.parse(f"op{parenthesis}{arguments}" if outside else text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        node = None
    call = node if isinstance(node, ast.Call) else None
    func = call.func if call else node
    if not isinstance(func, ast.Name):
        raise UserError(f"{key}: can't read {text!r}: expected op or op(argument, name=argument)")
    name = name if outside else func.id
    op = _find_op(name, text, key=key)
    signature = inspect.signature(op)
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
        _check_sign(value, argument, op, where=f"{key}: {text!r}")
    try:
        return op(*bound.args, **bound.kwargs)
    except ValueError as e:
        raise UserError(f"{key}: {text!r}: {e}") from None


def _find_op(name: str, text: str, *, key: str) -> Any:
    if is_part(name):
        return import_part(name, key=key, gives=(Callable,))
    if name in _ELSEWHERE:
        raise UserError(f"{key}: {text!r} is not an operation here: {_ELSEWHERE[name]}")
    if name not in OPS:
        raise UserError(f"{key}: unknown operation {name!r}{suggest(name, OPS)}")
    return OPS[name]


def _bind(signature: inspect.Signature, call: ast.Call | None) -> inspect.BoundArguments:
    if call is None:
        return signature.bind()
    args = [ast.literal_eval(a) for a in call.args]
    kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    if len(kwargs) < len(call.keywords):
        raise TypeError("an argument is given twice")
    return signature.bind(*args, **kwargs)


def _check_sign(value: Any, argument: str, op: Any, *, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):  # As 1e999 is read.
        raise UserError(f"{where}: {argument}={value}: expected a finite number")
    if not hasattr(op, "may_be_zero"):  # A function outside of this package.
        return
    if argument in op.may_be_zero and value < 0:
        raise UserError(f"{where}: {argument}={value}: expected 0 or more")
    if argument not in op.may_be_zero and value <= 0:
        raise UserError(f"{where}: {argument}={value}: expected more than 0")
