# SPDX-License-Identifier: Apache-2.0
"""What is read from a published file, and what is written to one."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Parameters under this package's names, and what must be known to use them.

    Attributes:
      params: arrays by path, as in `Transformer/encoderblock_0/LayerNorm_0/scale`; blocks are never
        stacked. The type is that of the file, bfloat16 included.
      layout: what the file was, for the screen: "timm safetensors".
      model: arguments of the model that parameters do not show and the layout fixes or its
        metadata state, as in `{"activation": "gelu_erf", "norm_epsilon": 1e-12}`.
      preprocess: what the weights expect of images, as far as it is known: `mean` and `std` of
        pixels in [0, 1] (one number or one for each channel), `image_size` (height, width), and
        `eval`, a value for `data.preprocess`.
      notes: what was left out or changed while reading, one line each.
    """

    params: dict[str, np.ndarray]
    layout: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocess: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
