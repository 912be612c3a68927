# SPDX-License-Identifier: Apache-2.0
"""The number of CPU devices that suits a config."""

import os
from collections.abc import Mapping
from typing import Any

from vit_jax.data.pipeline import find_shapes
from vit_jax.runtime.cpu_devices import is_forced
from vit_jax.utils.cores import count_cores
from vit_jax.utils.errors import UserError

# With fewer pixels for each device, or with more devices, waiting for each other costs more time
# than working side by side saves.
_LEAST_PIXELS = 2**16
_MOST_DEVICES = 8


def count_cpu_devices(config: Mapping[str, Any]) -> int | None:
    """The number of devices to split batches over: one for each core, where steps become faster.

    Args:
      config: of an experiment. Errors in it are reported later, when the experiment is built.

    Returns:
      None where the environment or the config sets the number.
    """
    if is_forced() or "JAX_NUM_CPU_DEVICES" in os.environ or config.get("mesh"):
        return None
    try:
        sections = [config["data"], *filter(None, (config.get("evals") or {}).values())]
        batches = [section.get("batch_size") for section in sections]
        micro_batch = batches[0] // ((config.get("optimizer") or {}).get("accum_steps") or 1)
        sizes = [micro_batch, *filter(None, batches)]
        line, key = sections[0]["preprocess"], "data.preprocess"
        pixels = min(h * w for h, w, _ in find_shapes(line, (None, None, 3), key=key))
        most = min(count_cores(), _MOST_DEVICES, micro_batch * pixels // _LEAST_PIXELS)
        fitting = [n for n in range(2, most + 1) if not any(size % n for size in sizes)]
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, UserError):
        return None
    return max(fitting, default=1)
