# SPDX-License-Identifier: Apache-2.0
"""Models as one compiled program, as runs have them: faster than a program for each operation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


def compiled(model: nn.Module) -> Callable[..., Any]:
    """`model.apply` with named arguments that are part of the program, except `rngs`.

    Args:
      model: whose arguments in order are arrays.
    """

    def apply(variables: Any, *inputs: Any, rngs: Any = None, **options: Any) -> Any:
        call = jax.jit(lambda v, r, *x: model.apply(v, *x, rngs=r, **options))
        return call(variables, rngs, *inputs)

    return apply
