# SPDX-License-Identifier: Apache-2.0
"""What GPUs can do."""

from typing import Any


def is_ampere(device: Any) -> bool:
    """Whether a JAX device is an NVIDIA GPU from Ampere on."""
    capability = getattr(device, "compute_capability", None)
    is_gpu = device.platform in ("gpu", "cuda")
    return is_gpu and capability is not None and float(capability) >= 8
