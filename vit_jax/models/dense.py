# SPDX-License-Identifier: Apache-2.0
"""Dense layers on tokens, with gradients of their own."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Rows of the product that sums the gradients of a bias. XLA makes the product with a single row a
# sum again; TPUs compute at least eight rows at a time.
_ROWS = 8


class Dense(nn.Module):
    """Multiplies tokens by a kernel and adds a bias; parameters are those of Flax's layers.

    Call: `[..., *inputs]`, of `num_inputs` dimensions, to `[..., *features]` in `dtype`.
    Parameters: `kernel` `[*inputs, *features]` and `bias` `[*features]`, float32, with the names,
    the shapes and the initial values of `flax.linen.Dense` and `flax.linen.DenseGeneral`.

    Attributes:
      features: dimensions of the output.
      num_inputs: number of dimensions of a token in the input.
      use_bias: whether a bias is added.
      dtype: of the product and the output.
      kernel_init, bias_init: of the parameters, as for `flax.linen.Dense`; the kernel is
        initialised as a matrix.
      dot_general, dot_general_cls: the product, or a module that computes it; see
        `BlockConfig.product`.
    """

    features: tuple[int, ...]
    num_inputs: int = 1
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.xavier_uniform()
    bias_init: Callable[..., Any] = nn.initializers.zeros
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general
    dot_general_cls: Callable[[], Any] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[x.ndim - self.num_inputs :]
        kernel, bias = make_parameters(
            self, inputs, self.features, self.kernel_init, self.bias_init if self.use_bias else None
        )
        multiply = self.dot_general if self.dot_general_cls is None else self.dot_general_cls()
        axes = (tuple(range(x.ndim - self.num_inputs, x.ndim)), tuple(range(self.num_inputs)))
        y = multiply(x.astype(self.dtype), kernel.astype(self.dtype), (axes, ((), ())))
        if bias is None:
            return y
        # As vectors: with a dimension of heads, XLA chooses layouts that have to be copied.
        rows = y.reshape(*y.shape[: y.ndim - bias.ndim], -1)
        return _add_bias(rows, bias.astype(self.dtype).reshape(-1)).reshape(y.shape)


def make_parameters(
    module: nn.Module,
    inputs: tuple[int, ...],
    features: tuple[int, ...],
    kernel_init: Callable[..., Any],
    bias_init: Callable[..., Any] | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The kernel `[*inputs, *features]` and the bias `[*features]` of a layer, float32.

    Without `bias_init` there is no bias.
    """
    rows, columns = math.prod(inputs), math.prod(features)

    def init(of: Callable[..., Any], size: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        return lambda rng: of(rng, size).reshape(shape)

    kernel = module.param("kernel", init(kernel_init, (rows, columns), (*inputs, *features)))
    if bias_init is None:
        return kernel, None
    return kernel, module.param("bias", init(bias_init, (columns,), features))


@jax.custom_vjp
def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds `[features]` to `[..., features]`, of the same floating dtype."""
    return x + bias


def _add_bias_fwd(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return x + bias, None


def _add_bias_bwd(_: None, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return grad, jax.lax.platform_dependent(grad, tpu=sum_by_product, default=_sum)


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


def _sum(x: jax.Array) -> jax.Array:
    return x.sum(tuple(range(x.ndim - 1)))


def sum_by_product(x: jax.Array) -> jax.Array:
    """The sums of the columns of `[..., columns]`, of any floating dtype, as a product with ones.

    On TPUs that takes less time than a sum. The products are added in float32.
    """
    axes = tuple(range(x.ndim - 1))
    # Hidden from XLA, which makes a product with known ones a sum again.
    ones = jax.lax.optimization_barrier(jnp.ones((_ROWS, *x.shape[:-1]), x.dtype))
    sums = jax.lax.dot_general(
        ones,
        x,
        ((tuple(axis + 1 for axis in axes), axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return sums[0].astype(x.dtype)
