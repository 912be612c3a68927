# SPDX-License-Identifier: Apache-2.0
"""A transformer from tokens of text to one vector, of the blocks of the Vision Transformer.

With its options it is the text tower of CLIP, open_clip, SigLIP and SigLIP 2.
Sources: arXiv:2103.00020, section 2.4; arXiv:2303.15343; arXiv:2502.14786.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.block_config import (
    Activation,
    Attention,
    BlockConfig,
    Blocks,
    Constrain,
    unconstrained,
)
from vit_jax.models.blocks import DepthSchedule, Encoder, Remat
from vit_jax.models.heads import HeadInit, MAPHead, apply_head
from vit_jax.models.lora import Lora
from vit_jax.utils.errors import UserError

TextPooling = Literal["last", "first", "eot", "gap", "map", "max"]
Dtype = Literal["float32", "bfloat16"]


class TextTransformer(nn.Module, kw_only=True):
    """Tokens to an embedding.

    Attributes that `VisionTransformer` has too are documented there.

    Attributes:
      vocab_size: number of different tokens.
      context_length: number of tokens of a text, with padding.
      num_classes: width of the `head`; 0 for no head.
      pooling: what represents the text: the state of its last or first token (`last`, `first`),
        that of the end of the text (`eot`), the mean or the largest values over all tokens (`gap`,
        `max`), or attention pooling (`map`). Padding is not masked.
      eot_id: the token that ends a text, whose first position `eot` pools; None for the position
        of the greatest token, which ends a text in CLIP's vocabulary.
      causal: whether a token attends only to itself and those before it, as in CLIP.
      embedding_init_std: standard deviation of the initial embeddings of tokens; None for
        1 / sqrt(hidden_size).
      positions_init_std: the same of position embeddings.

    Call: tokens, int32 `[batch, context_length]`, to `(embedding, out)`: the embedding is float32
    `[batch, num_classes]`, or without a head `pre_logits`; `out` holds `encoded`
    `[batch, context_length, hidden]` and `pre_logits` `[batch, hidden]` in `dtype`, and with a head
    `logits`, which is the embedding.
    """

    num_classes: int
    vocab_size: int
    context_length: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    pooling: TextPooling = "last"
    eot_id: int | None = None
    causal: bool = False
    activation: Activation = "gelu_tanh"
    qk_norm: bool = False
    layer_scale_init: float | None = None
    norm_epsilon: float = 1e-6
    embedding_init_std: float | None = None
    positions_init_std: float | None = None
    head_bias: bool = True
    head_init: HeadInit = "lecun_normal"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    stochastic_depth_schedule: DepthSchedule = "linear"
    scan: bool = False
    remat: Remat = "none"
    attention: Attention = "auto"
    blocks: Blocks = "auto"
    dtype: Dtype = "float32"
    float8: bool = False
    lora: Lora | None = None
    constrain: Constrain = unconstrained

    @property
    def block_config(self) -> BlockConfig:
        """The options that all layers share: the attributes with the names of its fields."""
        names = [field.name for field in dataclasses.fields(BlockConfig)]
        return BlockConfig(**{name: getattr(self, name) for name in names if hasattr(self, name)})

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        if tokens.ndim != 2 or tokens.shape[1] != self.context_length:
            raise UserError(
                f"tokens are {list(tokens.shape)}: expected [batch, {self.context_length}], as "
                "model.text.context_length says"
            )
        encoded = self._encode(self._embed(tokens), train=train)
        x = self._pool(encoded, tokens, train=train)
        out = {"encoded": encoded, "pre_logits": x}
        if not self.num_classes:
            return x, out
        logits = apply_head(
            x,
            self.num_classes,
            bias=self.head_bias,
            bias_init=0.0,
            init=self.head_init,
            constrain=self.constrain,
        )
        return logits, out | {"logits": logits}

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """Looks up the embeddings of tokens, `[batch, length, hidden]`."""
        std = self._default_std if self.embedding_init_std is None else self.embedding_init_std
        table = _Embedding(self.vocab_size, self.hidden_size, std, name="Embed_0")()
        # FSDP stores parts of the table, which are gathered here; over `tensor` it stays split.
        table = self.constrain(table, ("vocabulary", None))
        # The gradients of a token that is in many texts are summed in float32.
        return jnp.take(table, tokens, axis=0).astype(self.dtype)

    def _encode(self, embedded: jax.Array, *, train: bool) -> jax.Array:
        std = self._default_std if self.positions_init_std is None else self.positions_init_std
        return Encoder(
            config=self.block_config,
            num_layers=self.num_layers,
            num_class_tokens=0,
            positions_init_std=std,
            stochastic_depth_rate=self.stochastic_depth_rate,
            stochastic_depth_schedule=self.stochastic_depth_schedule,
            scan=self.scan,
            remat=self.remat,
            name="Transformer",
        )(embedded, None, train=train)

    @property
    def _default_std(self) -> float:
        return self.hidden_size**-0.5

    def _pool(self, encoded: jax.Array, tokens: jax.Array, *, train: bool) -> jax.Array:
        if self.pooling == "last":
            return encoded[:, -1]
        if self.pooling == "first":
            return encoded[:, 0]
        if self.pooling == "eot":
            # Both find the first position if there are several.
            found = tokens if self.eot_id is None else tokens == self.eot_id
            rows = jnp.arange(tokens.shape[0])
            return encoded[rows, jnp.argmax(found, axis=1)]
        if self.pooling == "gap":
            return encoded.mean(axis=1)
        if self.pooling == "max":
            return encoded.max(axis=1)
        return MAPHead(self.block_config, name="MAPHead_0")(encoded, train=train)


class _Embedding(nn.Module):
    """The embeddings of all tokens, float32 `[vocab_size, hidden]`, initialised from N(0, std)."""

    vocab_size: int
    hidden_size: int
    std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        shape = (self.vocab_size, self.hidden_size)
        return self.param("embedding", nn.initializers.normal(self.std), shape)
