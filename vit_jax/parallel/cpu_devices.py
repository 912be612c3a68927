# SPDX-License-Identifier: Apache-2.0
"""The cores of a CPU as devices: else what is no matrix product hardly uses more than one."""

import os
from collections.abc import Mapping
from typing import Any

import jax

from vit_jax.utils.cores import count_cores
from vit_jax.utils.errors import UserError

# More devices wait for each other more often than they help, and so do devices with few images.
_MOST_DEVICES = 8
_LEAST_IMAGES = 8


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
    if _is_forced():
        raise UserError(f"--cpu_devices={count}: XLA_FLAGS has a number too; leave out one of them")
    jax.config.update("jax_num_cpu_devices", count)


def count_cpu_devices(config: Mapping[str, Any]) -> int | None:
    """Devices that a config's batches can be split over: a core each, if the CPU is all there is.

    Args:
      config: of an experiment; what is wrong with it is said elsewhere.

    Returns:
      None where the environment or the config says how many there are.
    """
    if _is_forced() or "JAX_NUM_CPU_DEVICES" in os.environ or config.get("mesh"):
        return None
    try:
        sections = [config["data"], *filter(None, (config.get("evals") or {}).values())]
        batches = [section.get("batch_size") for section in sections]
        micro_batch = batches[0] // ((config.get("optimizer") or {}).get("accum_steps") or 1)
        sizes = [micro_batch, *filter(None, batches)]
        most = min(count_cores(), _MOST_DEVICES, micro_batch // _LEAST_IMAGES)
        fitting = [n for n in range(2, most + 1) if not any(size % n for size in sizes)]
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    return max(fitting, default=1)


def _is_forced() -> bool:
    return "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
