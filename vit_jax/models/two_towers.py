# SPDX-License-Identifier: Apache-2.0
"""A model of images and one of texts, whose embeddings are compared.

Sources: CLIP, arXiv:2103.00020; LiT, arXiv:2111.07991; SigLIP, arXiv:2303.15343.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.block_config import Constrain, unconstrained
from vit_jax.models.text import TextTransformer
from vit_jax.models.vit import VisionTransformer

# The models by the first part of the paths of their parameters, and their sections of the config.
TOWERS = {"img": "image", "txt": "text"}


class TwoTowers(nn.Module, kw_only=True):
    """Images and texts to unit vectors of the same width, and what scales their products.

    Attributes:
      img: model of the images; its embedding is its logits, or without a head `pre_logits`.
      txt: the same of texts.
      scale_init: initial factor on the products of unit vectors, above 0. The parameter `t`,
        float32 `[1]`, is its logarithm, as in published weights.
      bias_init: initial value of what is added to them, the parameter `b`, float32 `[1]`; None for
        no such parameter.
      constrain: shards activations over a mesh.

    Call: images, float `[batch, height, width, channels]`, and tokens, int32
    `[texts, context_length]`, of which one may be None, to `(zimg, ztxt, out)`: float32 unit
    vectors `[batch, width]` and `[texts, width]`, None for what was not given; `out` holds `scale`
    and `bias`, float32 scalars, and `img` and `txt`, what the models of what was given return
    beside the embedding. The logit of a pair is `scale * zimg @ ztxt + bias`.
    """

    img: VisionTransformer
    txt: TextTransformer
    scale_init: float = 10.0
    bias_init: float | None = None
    constrain: Constrain = unconstrained

    @property
    def num_classes(self) -> int:
        """0, since there is no head for classes; see `models.interface`."""
        return 0

    @property
    def towers(self) -> dict[str, Any]:
        """Both models, by the first part of the paths of their parameters."""
        return {name: getattr(self, name) for name in TOWERS}

    @property
    def context_length(self) -> int:
        return self.txt.context_length

    @property
    def num_class_tokens(self) -> int:
        """Tokens of an image that have position embeddings and are no patches."""
        return self.img.num_class_tokens

    @property
    def width(self) -> int:
        """The width of the embeddings."""
        return self.txt.num_classes or self.txt.hidden_size

    def grid(self, image_size: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches in an image of (height, width) pixels."""
        return self.img.grid(image_size)

    @nn.compact
    def __call__(
        self, images: jax.Array | None = None, tokens: jax.Array | None = None, *, train: bool
    ) -> tuple[jax.Array | None, jax.Array | None, dict[str, Any]]:
        t = self.param("t", nn.initializers.constant(math.log(self.scale_init)), (1,))
        out: dict[str, Any] = {"scale": jnp.exp(t[0]), "bias": jnp.zeros((), jnp.float32)}
        if self.bias_init is not None:
            out["bias"] = self.param("b", nn.initializers.constant(self.bias_init), (1,))[0]
        zimg, ztxt = None, None
        if images is not None:
            zimg, out["img"] = self.img(images, train=train)
            zimg = self._normalize(zimg)
        if tokens is not None:
            ztxt, out["txt"] = self.txt(tokens, train=train)
            ztxt = self._normalize(ztxt)
        return zimg, ztxt, out

    def _normalize(self, z: jax.Array) -> jax.Array:
        z = self.constrain(z.astype(jnp.float32), ("batch", None))
        # The small number keeps the gradient of a vector of zeros finite.
        return z * jax.lax.rsqrt(jnp.sum(z * z, axis=-1, keepdims=True) + 1e-24)
