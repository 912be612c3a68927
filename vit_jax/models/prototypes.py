# SPDX-License-Identifier: Apache-2.0
"""The projection head of DINO: from a feature to a score for each prototype."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.activations import gelu
from vit_jax.models.block_config import Constrain, unconstrained

# See `Prototypes`.
LastLayer = Literal["unit", "weight_norm", "linear"]
_INIT = nn.initializers.normal(stddev=0.02)


class Prototypes(nn.Module, kw_only=True):
    """A linear layer without a bias, with one column for each prototype.

    Attributes:
      count: number of prototypes.
      kind: "unit" for columns of length 1; "weight_norm" for columns of a learned length, which
        starts at 1; "linear" for columns as they are.
      dtype: dtype of the product; the scores are float32.
      constrain: shards the columns over a mesh.

    Call: `[..., width]` to scores, float32 `[..., count]`.
    """

    count: int
    kind: LastLayer
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _INIT, (x.shape[-1], self.count))
        if self.kind != "linear":
            kernel = kernel / jnp.linalg.norm(kernel, axis=0)
        if self.kind == "weight_norm":
            kernel = kernel * self.param("scale", nn.initializers.ones, (self.count,))
        kernel = self.constrain(kernel.astype(self.dtype), (None, "classes"))
        scores = jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return self.constrain(scores, ("batch", *(None,) * (x.ndim - 2), "classes"))


class PrototypeHead(nn.Module, kw_only=True):
    """An MLP with exact GELU, an L2 normalisation and `Prototypes`.

    Attributes:
      prototypes: number of prototypes.
      hidden_size: width of the hidden layers.
      bottleneck_size: width before the prototypes.
      num_layers: number of layers of the MLP, with the one to the bottleneck.
      last_layer: `Prototypes.kind`.
      dtype: dtype of the computation. Parameters and scores are float32.
      constrain: shards the prototypes over a mesh.

    Call: features `[..., width]` of any floating dtype to scores, float32 `[..., prototypes]`.
    Source: arXiv:2104.14294, appendix C.
    """

    prototypes: int
    hidden_size: int = 2048
    bottleneck_size: int = 256
    num_layers: int = 3
    last_layer: LastLayer = "unit"
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            last = i == self.num_layers - 1
            width = self.bottleneck_size if last else self.hidden_size
            x = nn.Dense(width, dtype=self.dtype, kernel_init=_INIT)(x)
            x = x if last else gelu(x, approximate=False)
        x = x.astype(jnp.float32)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return Prototypes(
            count=self.prototypes,
            kind=self.last_layer,
            dtype=self.dtype,
            constrain=self.constrain,
            name="prototypes",
        )(x)
