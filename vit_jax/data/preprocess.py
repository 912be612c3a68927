# SPDX-License-Identifier: Apache-2.0
"""Preprocessing as one readable line: `decode|inception_crop(224)|flip_lr`."""

import ast
import inspect
from typing import Any

import numpy as np

from vit_jax.data.image_ops import OPS, Features, Random, Transform
from vit_jax.utils.errors import UserError, suggest
from vit_jax.utils.registry import check_type


def parse_preprocess(text: str, *, key: str) -> tuple[Transform | Random, ...]:
    """Turns `op(args)|op|...` into operations. Arguments are literals; nothing is evaluated.

    Args:
      text: operations in the order in which they run.
      key: where the text stands in the config, for errors.

    Raises:
      UserError: an unknown operation or argument, with the operation at fault.
    """
    return tuple(_parse_op(part.strip(), key=key) for part in text.split("|"))


def _parse_op(text: str, *, key: str) -> Transform | Random:
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        node = None
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call else node
    if not isinstance(name, ast.Name):
        raise UserError(f"{key}: can't read {text!r}: expected op or op(argument, name=argument)")
    if name.id not in OPS:
        raise UserError(f"{key}: unknown operation {name.id!r}{suggest(name.id, OPS)}")
    op = OPS[name.id]
    signature = inspect.signature(op)
    try:
        arguments = _bind(signature, call)
    except (TypeError, ValueError):
        usage = f"{name.id}{signature}".replace(" -> None", "")
        raise UserError(f"{key}: wrong arguments in {text!r}: expected {usage}") from None
    for argument, value in arguments.items():
        annotation = signature.parameters[argument].annotation
        check_type(value, annotation, key=f"{key}: {name.id}: {argument}")
        if isinstance(value, int | float) and value <= 0:
            raise UserError(f"{key}: {text!r}: {argument}={value}: expected more than 0")
    try:
        return op(**arguments)
    except ValueError as e:
        raise UserError(f"{key}: {text!r}: {e}") from None


def _bind(signature: inspect.Signature, call: ast.Call | None) -> dict[str, Any]:
    if call is None:
        return dict(signature.bind().arguments)
    args = [ast.literal_eval(a) for a in call.args]
    kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    if len(kwargs) < len(call.keywords):
        raise TypeError("an argument is given twice")
    return dict(signature.bind(*args, **kwargs).arguments)


def apply(
    ops: tuple[Transform | Random, ...], features: Features, rng: np.random.Generator
) -> Features:
    """Runs the operations one after the other."""
    for op in ops:
        features = op(features, rng) if isinstance(op, Random) else op(features)
    return features
