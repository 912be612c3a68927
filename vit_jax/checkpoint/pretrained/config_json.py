# SPDX-License-Identifier: Apache-2.0
"""Reads the JSON files that are published with weights, of any project."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vit_jax.utils.bounds import shorten
from vit_jax.utils.class_names import normalize_name
from vit_jax.utils.text import printable

_MAX_NUMBER = 1e30


def check_keys(
    stated: Mapping[str, Any], known: Collection[str], *, where: str = "", file: str = "config.json"
) -> None:
    """Refuses keys that may change what the model computes.

    Args:
      stated: key and value; a value of None states nothing.
      known: keys that are used, or that do not change the function of the model.
      where: of the keys within the file, such as "model_args.".
      file: name of the file, for the error.

    Raises:
      ValueError: there is another key.
    """
    for key, value in stated.items():
        if key not in known and value is not None:
            what = f"{where}{shorten(key)[1:-1]}={shorten(value)}"
            raise ValueError(
                f"{what} in {file} is unknown here and may change what the model computes; "
                f"remove it from {file} if it does not"
            )


def check_values(
    stated: Mapping[str, Any],
    expected: Mapping[str, Collection[Any]],
    *,
    where: str = "",
    file: str = "config.json",
) -> None:
    """Refuses values that select a function that no model here has.

    Args:
      stated: key and value; a value of None states nothing.
      expected: the values of some keys that the models here have.
      where: see `check_keys`.
      file: see `check_keys`.

    Raises:
      ValueError: a key of `expected` has another value.
    """
    for key, values in expected.items():
        value = stated.get(key)
        if value is not None and value not in values:
            named = " or ".join(str(value) for value in values if value != "")
            raise ValueError(f"{where}{key}={shorten(value)} in {file}: expected {named}")


def check_sizes(
    stated: Mapping[str, Any],
    found: Mapping[str, Any],
    *,
    where: str = "",
    file: str = "config.json",
) -> None:
    """Refuses a description of another model than that of the tensors.

    Args:
      stated: key and value; a value of None states nothing.
      found: the values of the same keys that follow from the tensors: numbers, bools, pairs, for
        which one number states both, or words, which no value equals.
      where: see `check_keys`.
      file: see `check_keys`.

    Raises:
      ValueError: a value differs.
    """
    for key, value in found.items():
        said = stated.get(key)
        if isinstance(value, tuple) and said is not None:
            said = tuple(said) if isinstance(said, list | tuple) else (said, said)
        if said is not None and said != value:
            have = f"show {key}=" if isinstance(value, bool) else "have "
            words = "x".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(
                f"{where}{key}={shorten(stated[key])} in {file}, but the tensors "
                f"{have}{words}: the files are not of the same model"
            )


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number with which one can compute."""
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER


def read_pair(size: Any, key: str) -> tuple[int, int]:
    """Returns (height, width) of a size: a number, two, or a mapping.

    Raises:
      ValueError: it is none of these; the message starts with `key`.
    """
    pair: Sequence[Any] = size if isinstance(size, list | tuple) else (size, size)
    if isinstance(size, Mapping):
        pair = size.get("height"), size.get("width")
    sides = [n for n in pair if type(n) is int and n > 0]
    if len(pair) != 2 or len(sides) != 2:
        raise ValueError(f"{key} is {shorten(size)}; expected an integer above 0, or two")
    return sides[0], sides[1]


def read_colors(value: Any) -> Any:
    """Returns the mean or deviation of pixels, a number or one a channel, as a number or a tuple.

    `check_description` refuses what is neither.
    """
    return tuple(value) if isinstance(value, list | tuple) else value


def read_class_names(
    names: Any, *, key: str, num_classes: int | None
) -> tuple[tuple[str, ...] | None, list[str]]:
    """Returns the class names of a head by label, None if there are none, and notes.

    Args:
      names: names in the order of the labels, or names by label; JSON has labels as text.
      key: of the names in config.json.
      num_classes: width of the head; None without a head.

    Raises:
      ValueError: a label is no number, or a name no text.
    """
    if not names or num_classes is None:
        return None, []
    try:
        pairs = list(names.items() if isinstance(names, Mapping) else enumerate(names))
        if isinstance(names, str) or not all(isinstance(name, str | int) for _, name in pairs):
            raise TypeError
        by_label = {int(label): name for label, name in pairs}
    except (TypeError, ValueError):
        raise ValueError(
            f"{key}={shorten(names)} in config.json: expected class names, or class names by number"
        ) from None
    if all(name == f"LABEL_{label}" for label, name in by_label.items()):
        return None, []  # Hugging Face writes these where no names were given.
    if sorted(by_label) != list(range(num_classes)):
        return None, [
            f"class names: {key} in config.json has {len(by_label)} names, and the head "
            f"{num_classes} classes: not used"
        ]
    return tuple(normalize_name(printable(by_label[i])) for i in range(num_classes)), []
