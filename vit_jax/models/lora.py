# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of matrix products: what is trained in place of their kernels.

Sources: LoRA, arXiv:2106.09685; rank-stabilised scaling, arXiv:2312.03732; DoRA, arXiv:2402.09353.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit_jax.models.products import dot_stored, dot_tokens
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import bind
from vit_jax.utils.tree import flatten

# Name of the module that holds the adapter of a product, beside its kernel.
NAME = "lora"

# The products of encoder blocks: projections of attention, and MLPs.
TARGETS = (r".*/(query|key|value|out|Dense_0|Dense_1|gate)/kernel",)

# What is trained beside the adapters: heads, and of two towers also scale and bias of the pairs.
TRAIN = ("head/.*", "head_dist/.*")
_TRAIN_TOWERS = ("(img|txt)/head/.*", "t", "b")

# Of the parameters of an adapter, the one that belongs to its kernel and is not trained.
KERNEL_SCALE = "kernel_scale"
_LEVELS = 127  # of int8, on each side of zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Which kernels have an adapter, and of which size.

    An adapter adds scale * A B to a kernel W `[inputs, outputs]`, with A `[inputs, rank]` and B
    `[rank, outputs]`. B starts at zero, so a run starts from the model without adapters. The
    kernels themselves, and all parameters that `train` does not name, stay as they are.

    Attributes:
      rank: of the adapters; 0 for no adapters.
      alpha: numerator of the scale; None for `rank`.
      scaling: the scale is alpha / rank (`linear`), or alpha / sqrt(rank) (`sqrt`).
      method: `lora`, or `dora`, which also trains the norm of each column of the adapted kernel, as
        a factor on the norm of that column of W.
      targets: regular expressions for whole paths of the kernels that have an adapter.
      patterns: pairs of an expression and other values of `rank` and `alpha`; the first match
        counts. A rank of 0 leaves a kernel without an adapter, and another one gives an adapter
        also to a kernel that is no target.
      train: expressions for parameters that are trained as they are, beside the adapters. The
        default also trains the heads of two towers, their scale and their bias.
      base: dtype in which the kernels of encoder blocks and those that have an adapter are kept,
        unless they are trained. With `int8` each output channel has a float32 scale, its largest
        magnitude / 127.

    Raises:
      UserError: a value is out of its range.
    """

    rank: int = 0
    alpha: float | None = None
    scaling: Literal["linear", "sqrt"] = "linear"
    method: Literal["lora", "dora"] = "lora"
    targets: tuple[str, ...] = TARGETS
    patterns: tuple[tuple[str, dict], ...] = ()
    train: tuple[str, ...] = TRAIN
    base: Literal["float32", "bfloat16", "int8"] = "float32"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self) if not self.rank else ():
            value = getattr(self, field.name)
            # JSON has lists in place of tuples.
            if (tuple(value) if isinstance(value, list) else value) != field.default:
                raise UserError(
                    f"lora.{field.name}={value!r} without lora.rank: there are no adapters, and "
                    "all parameters are trained; expected a rank, such as --config.lora.rank=8"
                )
        _check(self.rank, self.alpha, key="lora")
        for pattern in (*self.targets, *self.train, *(p for p, _ in self.patterns)):
            try:
                re.compile(pattern)
            except re.error as e:
                raise UserError(f"lora: {pattern!r} is not a regular expression: {e}") from None
        for pattern, changes in self.patterns:
            (args,) = bind(changes, _size, key=f"lora.patterns[{pattern!r}]")
            _check(**args, key=f"lora.patterns[{pattern!r}]")

    def __hash__(self) -> int:
        return hash(repr(self))  # The options of `patterns` are dicts.

    @property
    def frozen(self) -> tuple[str, ...]:
        """Regular expressions for whole paths of the parameters that are not trained."""
        of_towers = _TRAIN_TOWERS if self.train == TRAIN else ()
        trained = "|".join([rf"(.*/)?{NAME}/(?!{KERNEL_SCALE}$)[^/]+", *self.train, *of_towers])
        return (rf"(?!({trained})$).*",) if self.rank else ()

    def size(self, path: str) -> tuple[int, float]:
        """Returns the rank of the adapter of a kernel, 0 for none, and its scale."""
        rank = self._changes(path).get("rank", self.rank if self._is_target(path) else 0)
        return (rank, self.scale(path, rank)) if rank else (0, 0.0)

    def scale(self, path: str, rank: int) -> float:
        """Returns the scale of an adapter of a rank, that of the kernel `path`."""
        alpha = self._changes(path).get("alpha", self.alpha)
        alpha = rank if alpha is None else alpha
        return alpha / (rank if self.scaling == "linear" else math.sqrt(rank))

    def _is_target(self, path: str) -> bool:
        return any(re.fullmatch(pattern, path) for pattern in self.targets)

    def _changes(self, path: str) -> dict[str, Any]:
        """The values of the first pattern that matches a kernel."""
        found = (changes for pattern, changes in self.patterns if re.fullmatch(pattern, path))
        return next(found, {})

    def rounds(self, path: str) -> bool:
        """Returns whether a kernel is kept in the dtype `base`."""
        kept = any(re.fullmatch(pattern, path) for pattern in (*TARGETS, *self.targets))
        trained = any(re.fullmatch(pattern, path) for pattern in self.train)
        return self.base != "float32" and kept and not trained

    def store(self, params: Any, *, xp: Any = jnp) -> Any:
        """Returns parameters with the kernels of the base in their dtype, and their scales.

        Args:
          params: nested dict of a model with adapters, arrays of any float dtype. Kernels that are
            in their dtype already stay as they are.
          xp: `numpy` or `jax.numpy`, of the arrays.
        """
        return params if self.base == "float32" else self._store(params, (), xp)

    def _store(self, params: Any, path: tuple[str, ...], xp: Any) -> Any:
        if not isinstance(params, Mapping):
            return params
        stored = {name: self._store(x, (*path, name), xp) for name, x in params.items()}
        kernel: Any = params.get("kernel")
        if not hasattr(kernel, "dtype"):
            return stored
        if not self.rounds("/".join((*path, "kernel"))) or kernel.dtype == jnp.int8:
            return stored
        if self.base == "bfloat16":
            return stored | {"kernel": kernel.astype(jnp.bfloat16)}
        adapter = params.get(NAME)
        if not isinstance(adapter, Mapping) or KERNEL_SCALE not in adapter:
            return stored
        axes = tuple(i for i, n in enumerate(adapter[KERNEL_SCALE].shape) if n == 1)
        values, scale = round_to_int8(kernel, axes, xp=xp)
        return stored | {"kernel": values, NAME: {**stored[NAME], KERNEL_SCALE: scale}}

    def restore(self, params: Any) -> Any:
        """Returns parameters of `store`, NumPy arrays, with the rounded values as float32."""
        if self.base == "float32" or not isinstance(params, Mapping):
            return params
        restored = {name: self.restore(x) for name, x in params.items()}
        kernel: Any = params.get("kernel")
        if isinstance(kernel, np.ndarray) and kernel.dtype in (jnp.int8, jnp.bfloat16):
            scale = params[NAME][KERNEL_SCALE] if kernel.dtype == jnp.int8 else np.float32(1)
            restored["kernel"] = kernel.astype(np.float32) * scale
        return restored

    def check(self, paths: list[str]) -> None:
        """Checks that each expression matches a parameter of a model with adapters.

        Raises:
          UserError: one does not.
        """
        if not self.rank:
            return
        kernels = [p.replace(f"/{NAME}/a", "/kernel") for p in paths if p.endswith(f"/{NAME}/a")]
        for pattern in self.targets if self.targets != TARGETS else ():
            if not any(re.fullmatch(pattern, path) for path in kernels):
                raise UserError(
                    f"lora.targets: {pattern!r} matches no kernel of a matrix product; expected an "
                    "expression for whole paths, such as '.*/(query|value)/kernel'"
                )
        if not kernels:
            raise UserError("lora.targets: no kernel of this model has an adapter")
        targets = [path for path in paths if path.endswith("/kernel") and self._is_target(path)]
        for pattern, changes in self.patterns:
            # A rank of 0 takes the adapter of a target away.
            matched = targets if changes.get("rank") == 0 else kernels
            if not any(re.fullmatch(pattern, path) for path in matched):
                raise UserError(
                    f"lora.patterns: {pattern!r} matches no kernel that has an adapter; expected "
                    "an expression for whole paths, such as '.*/value/kernel'"
                )
        for pattern in (pattern for pattern in self.train if pattern not in TRAIN):
            if not any(re.fullmatch(pattern, path) for path in paths):
                raise UserError(
                    f"lora.train: {pattern!r} matches no parameter; expected an expression for "
                    "whole paths, such as 'head/.*'"
                )


def _size(*, rank: int = 0, alpha: float | None = None) -> None:
    """Has the signature of the options of a pattern."""


def _check(rank: int, alpha: float | None, *, key: str) -> None:
    if rank < 0:
        raise UserError(f"{key}.rank={rank}: expected 1 or more, or 0 for no adapters")
    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"{key}.alpha={alpha}: expected above 0, or None for the rank")


class LoraProduct(nn.Module):
    """Multiplies tokens and a kernel that has an adapter, if `lora` gives it one.

    Created by a layer as its `dot_general_cls`, so the adapter is stored below that layer.
    Parameters: `a` `[inputs, rank]`, uniform within 1 / sqrt(inputs), `b` `[rank, outputs]`, zeros,
    and with DoRA `magnitude` `[outputs]`, ones; float32.

    Call: as `product`, which multiplies by the kernel alone.
    """

    lora: Lora
    product: Callable[..., jax.Array] = dot_tokens

    @nn.compact
    def __call__(
        self, x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **_: Any
    ) -> jax.Array:
        path = "/".join((*self.path[:-1], "kernel"))
        rank, scale = self.lora.size(path)
        depth = len(dimension_numbers[0][0])
        if self.lora.rounds(path):
            y, kernel = self._multiply_stored(x, kernel, dimension_numbers)
        else:
            y = self.product(x, kernel, dimension_numbers)
        if not rank:
            return y
        inputs, outputs = math.prod(kernel.shape[:depth]), math.prod(kernel.shape[depth:])
        if rank > min(inputs, outputs):
            raise UserError(
                f"lora.rank={rank}: {path} is {inputs} x {outputs}; expected at most "
                f"{min(inputs, outputs)}"
            )
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        a = self.param("a", uniform, (inputs, rank))
        b = self.param("b", nn.initializers.zeros, (rank, outputs))
        # The small products are on whole rows of the input and the output.
        rows = x.reshape(*x.shape[: x.ndim - depth], inputs)
        update = dot_tokens(rows, a.astype(x.dtype), (((-1,), (0,)), ((), ())))
        update = dot_tokens(update, b.astype(x.dtype), (((-1,), (0,)), ((), ())))
        y = y + (scale * update).astype(y.dtype).reshape(y.shape)
        if self.lora.method == "lora":
            return y
        magnitude = self.param("magnitude", nn.initializers.ones, (outputs,))
        norm, adapted = column_norms(kernel.reshape(inputs, outputs), a, b, scale, xp=jnp)
        # As published, the gradient takes the norm of the adapted kernel for a constant.
        factor = magnitude * norm / jax.lax.stop_gradient(jnp.where(adapted > 0, adapted, 1))
        return y * factor.astype(y.dtype).reshape(kernel.shape[depth:])

    def _multiply_stored(
        self, x: jax.Array, kernel: jax.Array, dimension_numbers: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Multiplies by the kernel of the layer as it is stored, and returns its float32 values.

        The layer has cast `kernel`; the cast one is not used, so that the backward pass reads the
        stored one too.
        """
        scale, depth = None, len(dimension_numbers[0][0])
        if self.lora.base == "int8":
            shape = (*(1,) * depth, *kernel.shape[depth:])
            scale = self.param(KERNEL_SCALE, nn.initializers.ones, shape)
        layer = self.scope.parent if self.scope is not None else None
        stored = None if layer is None else layer.get_variable("params", "kernel")
        if stored is None or stored.dtype == jnp.float32:
            # While parameters are initialised, or for a model with float32 parameters.
            return self.product(x, kernel, dimension_numbers), kernel
        values = stored.astype(jnp.float32)
        y: Any = dot_stored(x, stored, scale, depth)
        return y, values if scale is None else values * scale


def column_norms(kernel: Any, a: Any, b: Any, scale: float, *, xp: Any) -> tuple[Any, Any]:
    """Returns the norms of the columns of a kernel without and with its adapter.

    Takes `[inputs, outputs]`, `[inputs, rank]` and `[rank, outputs]`, and returns float32
    `[outputs]` twice. `xp` is `numpy` or `jax.numpy`.
    """
    kernel = kernel.astype(xp.float32)
    squares = (xp.sum(w * w, axis=0) for w in (kernel, kernel + scale * (a @ b)))
    # The square root has no gradient at 0, which a column of zeros has.
    return tuple(xp.where(x > 0, xp.sqrt(xp.where(x > 0, x, 1)), 0) for x in squares)


def round_to_int8(kernel: Any, axes: tuple[int, ...], *, xp: Any) -> tuple[Any, Any]:
    """Rounds a kernel to int8, symmetrically, with a scale for each output channel.

    Args:
      kernel: of any float dtype and shape.
      axes: its input dimensions.
      xp: `numpy` or `jax.numpy`.

    Returns:
      int8 of the shape of the kernel, and float32 scales, whose input dimensions are 1. A channel
      of zeros has the scale 1.
    """
    kernel = kernel.astype(xp.float32)
    scale = xp.max(xp.abs(kernel), axis=axes, keepdims=True) / xp.float32(_LEVELS)
    scale = xp.where(scale > 0, scale, xp.float32(1))
    return xp.round(kernel / scale).astype(xp.int8), scale


def round_base(params: Mapping[str, np.ndarray], lora: Lora) -> dict[str, np.ndarray]:
    """Rounds the kernels of base weights as a run with adapters does, and returns float arrays.

    Args:
      params: of the base, arrays by path, without stacked blocks. With int8, kernels that have a
        `kernel_scale` of any values are rounded, and the result has their scales.
      lora: what the adapters were trained with.
    """
    tree = traverse_util.unflatten_dict(dict(params), sep="/")
    return flatten(lora.restore(lora.store(tree, xp=np)))


def merge_adapters(params: Mapping[str, np.ndarray], lora: Lora) -> dict[str, np.ndarray]:
    """Adds the adapters among parameters to their kernels.

    Args:
      params: arrays by path, without stacked blocks.
      lora: what the parameters were trained with.

    Returns:
      The parameters of the model without adapters.

    Raises:
      ValueError: an adapter has no kernel, or does not fit it.
    """
    merged = {path: x for path, x in params.items() if f"/{NAME}/" not in path}
    for path in (path for path in params if path.endswith(f"/{NAME}/a")):
        layer = path.removesuffix(f"/{NAME}/a")
        name = f"{layer}/kernel"
        a, b = (np.asarray(params[f"{layer}/{NAME}/{part}"], np.float32) for part in "ab")
        if name not in merged or merged[name].size != len(a) * b.shape[1]:
            raise ValueError(f"{path} does not fit the parameters beside it")
        kernel = np.asarray(merged[name])
        matrix = kernel.reshape(len(a), -1).astype(np.float32)
        scale = lora.scale(name, a.shape[1])
        adapted = matrix + scale * (a @ b)
        if lora.method == "dora":
            norm, now = column_norms(matrix, a, b, scale, xp=np)
            factor = params[f"{layer}/{NAME}/magnitude"] * norm / np.where(now > 0, now, 1)
            adapted = adapted * factor
        merged[name] = adapted.reshape(kernel.shape).astype(kernel.dtype)
    return merged
