# SPDX-License-Identifier: Apache-2.0
"""ImageNet ReaL: reassessed labels, several or none for an image.

Source: Beyer et al., arXiv:2006.07159.
"""

import re
from pathlib import Path
from typing import Any

from vit_jax.data.sources.base import Source
from vit_jax.utils.bounds import read_json
from vit_jax.utils.errors import UserError, describe_error

# The published labels are a list in the order of these numbers, from 1.
_VALIDATION_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


def read_labels(path: str, *, key: str) -> dict[str, list[int]] | list[list[int]]:
    """Reads a list of the labels of each validation image, or a dict from file names to labels.

    Raises `UserError`, with the config key of the path, if the file can't be read or has another
    form.
    """
    try:
        labels = read_json(Path(path).expanduser())
    except (OSError, ValueError) as e:
        raise UserError(f"{key}={path!r} can't be read: {describe_error(e)}") from None
    values = labels.values() if isinstance(labels, dict) else labels
    if not isinstance(labels, dict | list) or not all(map(_is_labels, values)):
        raise UserError(
            f"{key}={path!r}: expected a list of lists of labels, or a dict of them by file name"
        )
    return labels


def find_labels(
    labels: dict[str, list[int]] | list[list[int]], source: Source, *, num_classes: int, key: str
) -> list[frozenset[int]]:
    """Finds the labels of each record of a source, in its order, by the name of its file.

    Raises `UserError`, with the config key of the path, if a name is not among the labels, or if it
    has others than 0 to `num_classes` - 1.
    """
    found = []
    for index in range(len(source)):
        name = source.file_name(index)
        if isinstance(labels, dict):
            value = labels.get(name)
        else:
            match = _VALIDATION_FILE.fullmatch(name)
            number = int(match[1]) if match else 0
            value = labels[number - 1] if 0 < number <= len(labels) else None
        if value is None:
            expected = "one of its names" if isinstance(labels, dict) else "ILSVRC2012_val_NUMBER"
            raise UserError(f"{key}: it has no labels for the file {name!r}: expected {expected}")
        for label in value:
            if not 0 <= label < num_classes:
                raise UserError(
                    f"{key}: the file {name!r} has label {label}; expected integers from 0 to "
                    f"{num_classes - 1}"
                )
        found.append(frozenset(value))
    return found


def _is_labels(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(label, int) for label in value)
