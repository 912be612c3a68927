# SPDX-License-Identifier: Apache-2.0
"""Where and with what numbers were measured."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def write_results(
    path: Path, measured: Mapping[str, Any], *packages: str, indent: int | None = 2
) -> None:
    """Writes what was measured as JSON, after `describe_environment` of `packages`.

    Args:
      path: of the file; its folder is made.
      measured: JSON values by name; those of the environment may be among them.
      packages: whose versions matter.
      indent: of the lines; None for one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = describe_environment(*packages) | dict(measured)
    path.write_text(json.dumps(content, indent=indent) + "\n")
    print(f"wrote {path}")


def describe_device() -> str:
    """Kind of the devices that JAX takes; asked in a process of its own, as one takes the GPU."""
    program = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def versions_of(python: str, packages: str) -> dict[str, str]:
    """Versions of packages, by their names with spaces between, in another environment."""
    program = "import importlib.metadata as m, json, sys\n"
    program += "print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    done = subprocess.run(
        [python, "-c", program, *packages.split()], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
