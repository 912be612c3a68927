# SPDX-License-Identifier: Apache-2.0
"""Where and with what numbers were measured."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path


def describe_environment(*packages: str) -> dict[str, object]:
    """Date, machine and versions of Python and `packages`, to be written beside results."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
