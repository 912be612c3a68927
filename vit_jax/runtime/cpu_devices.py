# SPDX-License-Identifier: Apache-2.0
"""Uses the cores of a CPU as devices: in one device only matrix products use more than one core."""

import os

import jax

from vit_jax.utils.errors import UserError


def set_cpu_devices(count: int | None) -> None:
    """Sets the number of CPU devices before JAX creates its devices; None leaves it as it is.

    Raises:
      UserError: the number is not positive, or `XLA_FLAGS` sets one too.
    """
    if count is None:
        return
    if count < 1:
        raise UserError(f"--cpu_devices={count}: expected at least 1")
    if is_forced():
        raise UserError(f"--cpu_devices={count}: XLA_FLAGS has a number too; leave out one of them")
    jax.config.update("jax_num_cpu_devices", count)


def is_forced() -> bool:
    """Whether `XLA_FLAGS` sets the number of CPU devices."""
    return "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
