# SPDX-License-Identifier: Apache-2.0
"""Configs and other nested dicts of JSON values."""

import json
from typing import Any


def flatten_config(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested dict by dotted key, as they come back from JSON: pairs are lists."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat
