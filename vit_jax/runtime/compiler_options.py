# SPDX-License-Identifier: Apache-2.0
"""Options of XLA that a train step is compiled with, by the kind of its devices."""

import os
from typing import Any

from vit_jax.utils.gpus import is_ampere

_NVIDIA = {
    # Products by cuBLASLt, which adds biases and residual connections and computes GELU in the
    # kernel of the product. XLA has Triton compute products otherwise, and leaves these to kernels
    # of their own.
    "xla_gpu_enable_cublaslt": True,
    "xla_gpu_enable_triton_gemm": False,
    # XLA makes one product of those of queries, keys and values if they are small, and then splits
    # its result by kernels that take longer than three products.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


def compiler_options(device: Any) -> dict[str, Any]:
    """Options for `jax.jit`, by name, without those that the environment's XLA_FLAGS sets.

    Args:
      device: one of those that the step runs on.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    options = _NVIDIA if is_ampere(device) else {}
    return {name: value for name, value in options.items() if f"--{name}" not in flags}
