# SPDX-License-Identifier: Apache-2.0
"""Prompts of classes: names and templates become texts, and their embeddings a vector a class.

Source: arXiv:2103.00020 (CLIP), section 3.1.4.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.utils.class_names import normalize_name, read_names
from vit_jax.utils.errors import UserError
from vit_jax.utils.suggestions import suggest

# In place of the name of a class.
SLOT = "{}"

# Lists of templates by name. Those of "photos" are of this project; the published lists of 7 and 80
# can be given as a file.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "photos": (
        "{}",
        "a photo of a {}.",
        "a photo of the {}.",
        "a close view of a {}.",
        "a {} seen from far away.",
        "a blurred picture of a {}.",
        "a bright picture of a {}.",
        "a dark picture of a {}.",
        "a drawing of a {}.",
        "a picture with a {} in it.",
    ),
}

# What folders and TFDS call the classes of ImageNet.
_WORDNET_ID = re.compile(r"n\d{8}")

# Added to norms, as in the published code.
_EPSILON = 1e-8


def find_templates(given: str | Sequence[str], *, key: str) -> tuple[str, ...]:
    """Templates, each with one `{}` for the name of a class.

    Args:
      given: a name of `TEMPLATES`, one template, several, or the path of a text file with one a
        line.
      key: the config key or argument, for errors.

    Raises:
      UserError: the file can't be read, there are no templates, or one has not one `{}`.
    """
    if not isinstance(given, str):
        texts = isinstance(given, Sequence) and all(isinstance(text, str) for text in given)
        if not texts:
            raise UserError(
                f"{key}={given!r}: expected a text or several, each with {SLOT} for the name of "
                "the class"
            )
        templates = tuple(given)
    elif given in TEMPLATES:
        return TEMPLATES[given]
    elif SLOT in given:
        templates = (given,)
    elif Path(given).suffix or Path(given).exists():
        templates = read_names(Path(given).expanduser(), key=f"{key}={given!r}", what="template")
    else:
        raise UserError(
            f"{key}={given!r}: expected a file, a template with {SLOT} for the name of the class, "
            f"or one of {', '.join(map(repr, TEMPLATES))}{suggest(given, TEMPLATES)}"
        )
    if not templates:
        raise UserError(f"{key}={given!r}: expected at least one template")
    for template in templates:
        if template.count(SLOT) != 1:
            raise UserError(
                f"{key}: {template!r}: expected {SLOT} once, for the name of the class, such as "
                "'a photo of a {}.'"
            )
    return tuple(normalize_name(t) for t in templates)


def find_class_names(
    given: str | Sequence[str] | None,
    known: Sequence[str] | None,
    *,
    count: int,
    owner: str,
    key: str,
) -> tuple[str, ...]:
    """The names of all classes, in the order of their labels.

    Args:
      given: names, or the path of a text file with one a line; None for those of the data.
      known: names that the data has; None if it has none.
      count: the number of classes of the data.
      owner: the data, for errors.
      key: the config key or argument, for errors.

    Raises:
      UserError: there are none, or not one for each class, or those of the data are no words.
    """
    names: Sequence[str]
    if given is None:
        if known is None:
            raise UserError(
                f"{key}=None: {owner} has no class names: expected a text file with one a line"
            )
        if all(_WORDNET_ID.fullmatch(name) for name in known):
            raise UserError(
                f"{key}=None: {owner} names its classes by numbers of WordNet such as "
                f"{known[0]!r}: expected a text file with one name a line"
            )
        names = known
    elif isinstance(given, str):
        names = read_names(Path(given).expanduser(), key=f"{key}={given!r}")
    else:
        names = tuple(map(normalize_name, given))
    for label, name in enumerate(names):
        if not name.strip():
            raise UserError(f"{key}: class {label} has no name, so no prompt: expected one each")
    if len(names) != count:
        raise UserError(
            f"{key}: {len(names)} names for the {count} classes of {owner}: expected one each"
        )
    return tuple(names)


def write_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """All prompts, those of a class one after the other."""
    return [template.replace(SLOT, name) for name in names for template in templates]


def average_prompts(embeddings: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The unit vector of each class: that of the mean of the unit vectors of its prompts.

    Takes embeddings, float32 `[prompts, width]` of any length, and the class of each, int
    `[prompts]`; each class has at least one. Returns float32 `[num_classes, width]`.
    """
    units = normalize(embeddings.astype(np.float64))
    sums = np.zeros((num_classes, embeddings.shape[1]))
    np.add.at(sums, labels, units)
    counts = np.bincount(labels, minlength=num_classes)
    return normalize(sums / counts[:, None]).astype(np.float32)


def normalize(x: np.ndarray) -> np.ndarray:
    """Scales rows `[n, width]` of any float dtype to length 1."""
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + _EPSILON)
