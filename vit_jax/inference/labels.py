# SPDX-License-Identifier: Apache-2.0
"""Classes that are given as texts: each is the vector of its prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vit_jax.evaluators.prompts import average_prompts, find_templates, write_prompts
from vit_jax.inference.texts import TextTower, check_text, shorten
from vit_jax.utils.errors import UserError
from vit_jax.utils.text import printable

# Characters of labels in a message.
_SHOWN = 60


@dataclasses.dataclass(frozen=True)
class TextClasses:
    """Classes of images, made of texts by `LoadedModel.embed_labels`.

    Attributes:
      names: the text of each class.
      vectors: unit vectors, float32 `[classes, width]`.
    """

    names: tuple[str, ...]
    vectors: np.ndarray


def embed_labels(
    tower: TextTower,
    labels: Any,
    *,
    templates: str | Sequence[str],
    alone: bool,
    pad_rows: Callable[[int], int],
    key: str,
) -> TextClasses:
    """Makes classes of texts.

    Args:
      tower: embeds the prompts.
      labels: the text of each class.
      templates: a name of `prompts.TEMPLATES`, one or several templates with `{}` for the label, or
        a text file with one a line. The vectors of several prompts are averaged.
      alone: whether one label is enough: its probability does not depend on others.
      pad_rows: see `TextTower.embed`.
      key: what the user calls `labels`, for errors; `templates` gets the same form.

    Raises:
      UserError: a label is empty, has control characters, or is there twice; a prompt has more
        tokens than the model reads; two classes have the same tokens; or a template is wrong.
    """
    names = check_labels(labels, key=key)
    if len(names) == 1 and not alone:
        raise UserError(
            f"{key}: {shorten(names[0])} is the only one: expected at least two, since the "
            "probabilities of a softmax are shares"
        )
    patterns = find_templates(templates, key=key.replace("labels", "templates"))
    prompts = write_prompts(names, patterns)
    check_lengths(tower, prompts, key=key)
    tokens = tower.encode(prompts).reshape(len(names), -1)
    seen: dict[bytes, str] = {}
    for name, row in zip(names, tokens, strict=True):
        other = seen.setdefault(row.tobytes(), name)
        if other is not name:
            raise UserError(
                f"{key}: {shorten(other)} and {shorten(name)} have the same tokens, so that the "
                "model can't distinguish them: expected one of them"
            )
    embeddings = tower.embed(prompts, pad_rows=pad_rows)
    of_prompt = np.repeat(np.arange(len(names)), len(patterns))
    return TextClasses(names, average_prompts(embeddings, of_prompt, len(names)))


def check_labels(labels: Any, *, key: str) -> tuple[str, ...]:
    """Returns labels without white space around them, in Unicode form NFC.

    Raises:
      UserError: they are no list of texts, or see `embed_labels`.
    """
    texts = isinstance(labels, Sequence) and all(isinstance(label, str) for label in labels)
    if isinstance(labels, str) or not texts:
        shown = shorten(labels) if isinstance(labels, str) else printable(repr(labels)[:_SHOWN])
        raise UserError(f"{key}: {shown}: expected a list of texts, such as ['a cat', 'a dog']")
    if not labels:
        raise UserError(f"{key}: there are none: expected at least one text")
    names = tuple(check_text(label, key=f"{key}: text {i}") for i, label in enumerate(labels, 1))
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{key}: {shorten(name)} is given twice: expected each text once")
        seen.add(name)
    return names


def check_lengths(tower: TextTower, texts: Sequence[str], *, key: str) -> None:
    """Raises `UserError` if a text has more tokens than the model reads."""
    cut = tower.find_cut(texts)
    if cut:
        raise UserError(
            f"{key}: {shorten(cut[0])} has more tokens than the {tower.module.context_length} that "
            "the model reads: expected a shorter text"
        )
