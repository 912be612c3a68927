# SPDX-License-Identifier: Apache-2.0
"""Rounds the kernels of matrix products and convolutions to int8, one scale per output channel.

The scheme is symmetric: a kernel W becomes round(W / s) with s = max |W| / 127 over the inputs of
each output channel (Krishnamoorthi, arXiv:1806.08342, section 3.1). Embeddings, norms, biases and
products of activations stay as they are.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vit_jax.inference.model import LoadedModel
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten

_LARGEST = 127


@dataclasses.dataclass(frozen=True)
class Int8:
    """A kernel as `values`, int8 of its shape, times `scale`, float32, which broadcasts to it."""

    values: np.ndarray
    scale: np.ndarray

    def restore(self) -> np.ndarray:
        """Returns the rounded kernel, float32 of its shape."""
        return self.values.astype(np.float32) * self.scale


def quantize_kernel(kernel: np.ndarray, inputs: tuple[int, ...]) -> Int8:
    """Rounds a kernel, float of any shape, to int8; `inputs` are its axes that are contracted.

    A rounded kernel that is rounded again keeps its values.
    """
    kernel = np.asarray(kernel, np.float32)
    scale = np.abs(kernel).max(axis=inputs, keepdims=True) / np.float32(_LARGEST)
    # A channel of zeros keeps them, and a scale below the normal numbers has no inverse.
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    values = np.round(kernel / scale).clip(-_LARGEST, _LARGEST).astype(np.int8)
    return Int8(values, scale)


def find_inputs(path: str, ndim: int) -> tuple[int, ...] | None:
    """Returns the axes of a parameter that a product contracts; None if it is no kernel.

    Kernels are `[inputs, outputs]`, `[height, width, inputs, outputs]`, or of attention
    `[width, heads, head_dim]` and for the projection `out` `[heads, head_dim, width]`.
    """
    *parents, name = path.split("/")
    if name != "kernel" or ndim < 2:
        return None
    if ndim == 3 and not (parents and parents[-1] == "out"):
        return (0,)
    return tuple(range(ndim - 1))


def quantize_params(params: Any) -> dict[str, Int8]:
    """Rounds the kernels among parameters, a nested dict of arrays; returns them by path.

    Raises:
      UserError: a kernel has values that are not finite, or there is none.
    """
    kernels = {}
    for path, x in flatten(params).items():
        inputs = find_inputs(path, np.ndim(x))
        if inputs is None:
            continue
        kernel = np.asarray(x, np.float32)
        if not np.isfinite(kernel).all():
            raise UserError(
                f"--quantize: {path} has values that are not finite: expected finite weights"
            )
        kernels[path] = quantize_kernel(kernel, inputs)
    if not kernels:
        raise UserError(
            "--quantize: the model has no parameter named kernel: expected one of this package"
        )
    return kernels


def round_weights(model: LoadedModel) -> LoadedModel:
    """Returns the model with its kernels rounded as `quantize_params` does, in float32."""
    flat = dict(flatten(model.params))
    for path, kernel in quantize_params(model.params).items():
        flat[path] = jax.device_put(kernel.restore(), flat[path].sharding)
    return dataclasses.replace(model, params=_unflatten(flat))


def as_int8_function(model: LoadedModel, layer: str) -> Callable[[jax.Array], jax.Array]:
    """Returns `LoadedModel.as_function` of a model whose kernels are int8 constants."""
    kernels = quantize_params(model.params)
    others = {k: np.asarray(x) for k, x in flatten(model.params).items() if k not in kernels}

    def make_params() -> Any:
        # The barrier keeps compilers from folding the product into a constant of float32.
        restored = {
            path: jax.lax.optimization_barrier(jnp.asarray(kernel.values)).astype(jnp.float32)
            * kernel.scale
            for path, kernel in kernels.items()
        }
        return _unflatten(others | restored)

    return model.as_function(layer, make_params=make_params)


def count_bytes(params: Any) -> tuple[int, int]:
    """Returns the bytes of parameters as they are, and with their kernels in int8."""
    before = after = 0
    for path, x in flatten(params).items():
        before += x.nbytes
        inputs = find_inputs(path, x.ndim)
        if inputs is None:
            after += x.nbytes
        else:
            channels = x.size // int(np.prod([x.shape[axis] for axis in inputs]))
            after += x.size + 4 * channels
    return before, after


def _unflatten(flat: Mapping[str, Any]) -> Any:
    return traverse_util.unflatten_dict({tuple(k.split("/")): x for k, x in flat.items()})
