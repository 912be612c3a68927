# SPDX-License-Identifier: Apache-2.0
"""The commits of datasets of the Hugging Face hub that a run reads, also when it resumes."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax.checkpoint.workdir import find_config
from vit_jax.data.sources.hub import pin_name, unpin_name
from vit_jax.utils.errors import UserError

# The sections with names of datasets, and how those of the hub start.
_SECTIONS, _KIND = ("data", "evals"), "hf:"


def find_pins(config: ConfigDict | Mapping[str, Any], workdir: Path) -> dict[str, str]:
    """Returns the names of datasets of the hub that a config has, with the commit to read of each.

    Args:
      config: the config of a run.
      workdir: of the run; where the config in it has the commit of a name without a revision, this
        commit is read again.

    Raises:
      UserError: the hub can't be asked, or has no such dataset.
    """
    names, previous = _list_names(_as_dict(config)), None
    if not names:
        return {}
    with contextlib.suppress(UserError):  # A workdir that can't be read is refused later.
        previous = find_config(workdir)
    recorded = {unpin_name(name): name for name in _list_names(previous or {})}
    return {name: recorded.get(name) or pin_name(name) for name in names}


def use_pins(config: ConfigDict | Mapping[str, Any], pins: Mapping[str, str]) -> dict[str, Any]:
    """Returns a config with other names of datasets, as `find_pins` returns them."""
    values = _as_dict(config)
    return {**values, **{key: _replace(values[key], pins) for key in _SECTIONS if key in values}}


def _as_dict(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def _list_names(config: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for key in _SECTIONS for name in _walk(config.get(key))))


def _walk(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.startswith(_KIND):
        yield value
    elif isinstance(value, Mapping | ConfigDict):
        for inner in value.values():
            yield from _walk(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner)


def _replace(value: Any, pins: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return pins.get(value, value)
    if isinstance(value, Mapping):
        return {key: _replace(inner, pins) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replace(inner, pins) for inner in value)
    return value
