# SPDX-License-Identifier: Apache-2.0
"""The cores of a CPU as devices: else what is no matrix product hardly uses more than one."""

import os

import jax

from vit_jax.utils.errors import UserError


def set_cpu_devices(count: int | None) -> None:
    """Makes so many devices of the CPU, for programs that find no other; before JAX looks for any.

    Args:
      count: of devices; None leaves the number as it is.

    Raises:
      UserError: it is not positive, or the environment has a number too.
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
