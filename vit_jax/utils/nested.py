# SPDX-License-Identifier: Apache-2.0
"""Nested dicts of plain values, such as configs; `tree` is for pytrees of arrays."""

from collections.abc import Mapping
from typing import Any


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a config by dotted key; an empty section is a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
