# SPDX-License-Identifier: Apache-2.0
"""Config files, their arguments, and overrides of their keys."""

import ast
import inspect
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config.shipped import find_config
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.nested import flatten_config
from vit_jax.utils.registry import find_parts, trust_parts

_OVERRIDE = "--config."

# The last words of keys that can name a part outside of this package.
_NAMES = ("name", "data_name", "mixture", "preprocess", "trackers")

_WORDS = {"true": True, "false": False, "none": None}


def load_config(value: str, overrides: dict[str, Any]) -> ConfigDict:
    """Runs `get_config` of a config file and puts overrides into its result.

    Args:
      value: path of the file or name of a config of the package, see `find_config`, with its
        arguments after a colon.
      overrides: values by dotted key, as in `{"data.batch_size": 64}`.

    Raises:
      UserError: the file is missing or fails, or a key lies below a value.
    """
    path, argument = find_file(value)
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        given = () if argument is None else (argument,)
        _check_argument(value, get_config, given)
        config = get_config(*given)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"--config={value}: {describe_error(e)}") from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={value}: get_config gives {config!r}; expected a ConfigDict")
    trust_config(config)
    return override_config(config.to_dict(), overrides)


def _check_argument(value: str, get_config: Callable[..., Any], given: tuple[str, ...]) -> None:
    signature = inspect.signature(get_config)
    try:
        signature.bind(*given)
    except TypeError:
        name = value.partition(":")[0]
        if given:
            text = f"takes no argument; expected --config={name}"
        else:
            text = f"needs an argument; expected --config={name}:ARGUMENT, see its get_config"
        raise UserError(f"--config={value}: the config {text}") from None


def find_file(value: str) -> tuple[Path, str | None]:
    """Returns the file that the value of `--config` names, and its arguments if there is a colon.

    Raises:
      UserError: the file is missing.
    """
    name, colon, argument = value.partition(":")
    try:
        return find_config(name), argument if colon else None
    except UserError as e:
        raise UserError(f"--config={value}: {e}") from None


def trust_config(config: ConfigDict | Mapping[str, Any]) -> None:
    """Allows to import the modules that a config of the user names, see `trust_parts`.

    Args:
      config: nested, or values by dotted key.
    """
    trust_parts(list_modules(config))


def list_modules(config: ConfigDict | Mapping[str, Any]) -> list[str]:
    """Returns the modules outside of this package that a config names, in alphabetical order.

    Args:
      config: nested, or values by dotted key.
    """
    config = config.to_dict() if isinstance(config, ConfigDict) else config
    texts = [str(v) for k, v in flatten_config(config).items() if k.rpartition(".")[2] in _NAMES]
    modules = {name.partition(":")[0] for text in texts for name in find_parts(text)}
    if modules:
        # Imports libraries that commands on files do without.
        from vit_jax.data.sources import KINDS

        modules -= KINDS.keys()
    return sorted(modules)


def override_config(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of a config with other values of some dotted keys.

    The values are the user's: see `trust_config`.

    Raises:
      UserError: a key lies below a value.
    """
    trust_config(overrides)
    result = ConfigDict(config).to_dict()
    for key, override in overrides.items():
        *parents, leaf = key.split(".")
        section = result
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(
                    f"unknown config key {key}: {parent}={section!r} has nothing below it"
                )
        section[leaf] = override
    return ConfigDict(result)


def parse_overrides(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Separates `--config.KEY=VALUE` from the other command-line arguments.

    Values are Python literals, `true`, `false` and `none`; anything else is a string.

    Returns:
      The values by dotted key, and the remaining arguments.

    Raises:
      UserError: a key, or a part of it, is empty.
    """
    overrides, rest, todo = {}, [], iter(arguments)
    for argument in todo:
        if argument.startswith(_OVERRIDE):
            key, equals, text = argument.removeprefix(_OVERRIDE).partition("=")
            if not all(key.split(".")):
                raise UserError(f"{argument}: expected --config.KEY=VALUE")
            overrides[key] = parse_literal(text if equals else next(todo, ""))
        else:
            rest.append(argument)
    return overrides, rest


def parse_literal(text: str) -> Any:
    """The value of an override; see `parse_overrides`."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text
