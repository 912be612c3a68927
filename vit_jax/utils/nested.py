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


def as_tuples(value: Any) -> Any:
    """Returns a value from JSON with tuples in place of lists, at all levels."""
    if isinstance(value, dict):
        return {k: as_tuples(v) for k, v in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
