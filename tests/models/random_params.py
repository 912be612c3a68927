# SPDX-License-Identifier: Apache-2.0
"""Random parameters drawn without compiling a program, which takes longer than a test."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util


def random_params(model: nn.Module, *inputs: Any, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Parameters as they are after some training: no bias is 0, and no scale is 1.

    Args:
      model: whose parameters they are.
      inputs: of the model, or their shapes.
      seed: of the values.
      options: of the call of the model.
    """
    shapes = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, **options), *inputs)
    rng, params = np.random.default_rng(seed), {}
    for path, leaf in traverse_util.flatten_dict(shapes["params"]).items():
        values = 0.1 * rng.normal(size=leaf.shape)
        if path[-1] == "kernel":
            values = rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
        elif "scale" in path[-1]:
            values += 1
        params[path] = values.astype(leaf.dtype)
    return traverse_util.unflatten_dict(params)
