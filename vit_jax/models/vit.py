# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer, with its pre-training and fine-tuning heads.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929, section 3.1.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.layers import Constrain, Encoder, unconstrained
from vit_jax.utils.errors import UserError

Classifier = Literal["token", "gap", "unpooled", "token_unpooled"]


class VisionTransformer(nn.Module):
    """Images to logits.

    Attributes:
      num_classes: width of the `head`; 0 for no head, only the representation.
      patch_size: (height, width) of a patch in pixels.
      hidden_size: width of the encoder.
      num_layers: number of encoder blocks.
      num_heads: attention heads; must divide `hidden_size`.
      mlp_dim: hidden width of the MLP blocks.
      classifier: what represents the image: the final state of the class `token`; the mean over
        patches (`gap`, no class token); or every token (`unpooled`, `token_unpooled`).
      representation_size: width of the tanh layer `pre_logits` of the pre-training head; None for
        the fine-tuning head, which is one linear layer.
      dropout_rate: after the position embeddings, the attention and both MLP layers.
      attention_dropout_rate: on the attention weights.
      head_bias_init: initial value of the head's bias.
      dtype: of the computation. Parameters and logits are float32.
      constrain: places activations on a mesh.

    Call: images `[batch, height, width, channels]` (float, [-1, 1] for published weights; height
    and width divisible by the patch) to `(logits, out)`: logits are float32 `[batch, num_classes]`
    (`[batch, length, num_classes]` if unpooled); `out` holds `encoded` `[batch, length, hidden]`,
    `pre_logits` (the input of the head) and `logits`.
    """

    num_classes: int
    patch_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    classifier: Classifier = "token"
    representation_size: int | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    head_bias_init: float = 0.0
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: 1 with a class token, else 0."""
        return int(self.classifier in ("token", "token_unpooled"))

    def grid(self, image_size: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches in an image of (height, width) pixels."""
        for size, patch in zip(image_size, self.patch_size, strict=True):
            if size % patch:
                raise UserError(
                    f"an image of {_by(image_size)} can't be cut into patches of "
                    f"{_by(self.patch_size)}: set model.patch_size to a divisor, or resize in "
                    "data.preprocess"
                )
        return image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1]

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        self.grid(images.shape[1:3])
        x = nn.Conv(
            self.hidden_size,
            self.patch_size,
            strides=self.patch_size,
            padding="VALID",
            dtype=self.dtype,
            name="embedding",
        )(images)
        n, h, w, c = x.shape
        x = x.reshape(n, h * w, c)
        if self.num_prefix_tokens:
            cls = self.param("cls", nn.initializers.zeros, (1, 1, c)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (n, 1, c)), x], axis=1)

        encoded = Encoder(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            dtype=self.dtype,
            constrain=self.constrain,
            name="Transformer",
        )(x, train=train)

        x = self._pool(encoded)
        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x)
            x = nn.tanh(x)
        out = {"encoded": encoded, "pre_logits": x}
        if self.num_classes:
            x = nn.Dense(
                self.num_classes,
                dtype=jnp.float32,
                kernel_init=nn.initializers.zeros,
                bias_init=nn.initializers.constant(self.head_bias_init),
                dot_general=self._dot_by_classes,
                name="head",
            )(x)
            out["logits"] = x = self.constrain(x, ("batch", *(None,) * (x.ndim - 2), "classes"))
        return x, out

    def _dot_by_classes(self, x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any):
        # However the kernel is stored, no device shall compute the logits of all classes.
        return jax.lax.dot_general(x, self.constrain(kernel, (None, "classes")), *args, **kwargs)

    def _pool(self, encoded: jax.Array) -> jax.Array:
        if self.classifier == "token":
            return encoded[:, 0]
        if self.classifier == "gap":
            return encoded.mean(axis=1)
        return encoded


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
