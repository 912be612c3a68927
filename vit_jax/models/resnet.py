# SPDX-License-Identifier: Apache-2.0
"""The convolutional stem of hybrid Vision Transformers: a ResNet with weight standardisation.

Names and numerics are those of the published hybrids. Source: arXiv:2010.11929, section 3.1
("Hybrid Architecture"); Kolesnikov et al., arXiv:1912.11370.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class StdConv(nn.Module):
    """A convolution without bias whose kernel is standardised for each output channel.

    The kernel is shifted to mean 0 and divided by its standard deviation plus 1e-5, as in the
    published hybrids. With `epsilon` it is divided by the square root of its variance plus that, as
    in timm. Padding is "SAME". Source: arXiv:1903.10520.

    Call: `[batch, rows, columns, channels]` to `[batch, rows / strides[0], columns / strides[1],
    features]` in `dtype`, rounded up.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    epsilon: float | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        if self.epsilon is None:
            kernel = kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)
        else:
            kernel = kernel / jnp.sqrt(kernel.var(axis=(0, 1, 2)) + self.epsilon)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.strides,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the layers of a ResNet.

    Attributes:
      dtype: of the computation.
      conv_epsilon: see `StdConv`.
      norm_epsilon: of the group norms.
    """

    dtype: DTypeLike = jnp.float32
    conv_epsilon: float | None = None
    norm_epsilon: float = 1e-6

    def conv(
        self, features: int, size: int, name: str, strides: tuple[int, int] = (1, 1)
    ) -> StdConv:
        """Returns a convolution with kernels of `size` x `size` pixels."""
        return StdConv(
            features,
            (size, size),
            strides,
            epsilon=self.conv_epsilon,
            dtype=self.dtype,
            name=name,
        )

    def norm(self, name: str, init: Callable[..., Any] = nn.initializers.ones) -> nn.GroupNorm:
        """Returns a norm over groups of channels; `init` is that of its scales."""
        return nn.GroupNorm(epsilon=self.norm_epsilon, dtype=self.dtype, scale_init=init, name=name)


class ResidualUnit(nn.Module):
    """A residual bottleneck of 1x1, 3x3 and 1x1 convolutions.

    Call: as `StdConv`, with 4 * `features` channels in the output.
    """

    features: int
    strides: tuple[int, int]
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv, norm = self.layers.conv, self.layers.norm
        width = 4 * self.features
        shortcut = x
        if x.shape[-1] != width or self.strides != (1, 1):
            shortcut = norm("gn_proj")(conv(width, 1, "conv_proj", self.strides)(x))
        x = nn.relu(norm("gn1")(conv(self.features, 1, "conv1")(x)))
        x = nn.relu(norm("gn2")(conv(self.features, 3, "conv2", self.strides)(x)))
        x = norm("gn3", nn.initializers.zeros)(conv(width, 1, "conv3")(x))
        return nn.relu(shortcut + x)


class ResNetStage(nn.Module):
    """`num_units` bottlenecks, of which the first has the stride; see `ResidualUnit`."""

    num_units: int
    features: int
    strides: tuple[int, int]
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_units):
            strides = (1, 1) if i else self.strides
            x = ResidualUnit(self.features, strides, self.layers, name=f"unit{i + 1}")(x)
        return x


def apply_root(x: jax.Array, width: int, layers: Layers) -> jax.Array:
    """Applies the first layers, which shrink an image by 4; call it in a compact module.

    `x` is `[batch, rows, columns, channels]`; returns `[batch, rows / 4, columns / 4, width]` in
    the dtype of `layers`, rounded up.
    """
    x = layers.conv(width, 7, "conv_root", (2, 2))(x)
    x = nn.relu(layers.norm("gn_root")(x))
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")


def apply_stages(x: jax.Array, num_units: tuple[int, ...], width: int, layers: Layers) -> jax.Array:
    """Applies the stages `block1`, `block2`, ... of `num_units` bottlenecks each after the root.

    `x` is `[batch, rows, columns, width]`; returns `[batch, rows, columns, 4 * width]` in the dtype
    of `layers`, where each stage but the first halves rows and columns and doubles `width`.
    """
    for i, units in enumerate(num_units):
        strides = (2, 2) if i else (1, 1)
        x = ResNetStage(units, width * 2**i, strides, layers, name=f"block{i + 1}")(x)
    return x


def total_stride(num_units: tuple[int, ...]) -> int:
    """Returns the factor by which a ResNet shrinks the height and width of an image."""
    return 4 * 2 ** max(len(num_units) - 1, 0)
