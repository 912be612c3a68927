# SPDX-License-Identifier: Apache-2.0
"""The norms of a model, of one kind everywhere."""

import flax.linen as nn

from vit_jax.models.block_config import BlockConfig


def make_norm(config: BlockConfig, name: str | None = None) -> nn.Module:
    """Returns a layer that normalises the last dimension; statistics are float32.

    LayerNorm (arXiv:1607.06450) has the parameters `scale` and `bias`, and RMSNorm
    (arXiv:1910.07467) `scale` alone. `name` is that of the layer; both kinds have the same names in
    a model, those of LayerNorm.
    """
    kind = nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm
    return kind(epsilon=config.norm_epsilon, dtype=config.dtype, name=name)
