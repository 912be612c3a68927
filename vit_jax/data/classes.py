# SPDX-License-Identifier: Apache-2.0
"""Labels of datasets that number their classes differently, matched by the names of the classes."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data.sources.base import DatasetInfo, Shards, Source
from vit_jax.utils.errors import UserError
from vit_jax.utils.suggestions import suggest

_LISTED = 5  # class names in one line


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a model or of its training data.

    Attributes:
      count: labels are from 0 to `count` - 1.
      names: by label; None if the classes are known by their numbers only.
      owner: whose classes they are, for messages.
    """

    count: int
    names: tuple[str, ...] | None
    owner: str

    @classmethod
    def of(cls, info: DatasetInfo, owner: str) -> "Classes":
        """Returns the classes of a dataset."""
        return cls(info.num_classes, info.class_names, owner)

    def __str__(self) -> str:
        few = map(repr, self.names[:_LISTED] if self.names else range(min(self.count, _LISTED)))
        shown = ", ".join([*few, *(["..."] if self.count > _LISTED else [])])
        return f"{self.count} {'classes' if self.names else 'classes without names'} ({shown})"

    def numbers(self) -> list[int] | None:
        """The classes as numbers, by label; None if some are no numbers, or two are the same."""
        if self.names is None:
            return list(range(self.count))
        if not all(name.isdecimal() and len(name) < 10 for name in self.names):
            return None
        numbers = list(map(int, self.names))
        return numbers if len(set(numbers)) == len(numbers) else None


def match_labels(data: Classes, classes: Classes, *, key: str) -> tuple[np.ndarray, str]:
    """Finds the label that each class of a dataset has among other classes.

    Classes are matched by name; each class of the data must have its counterpart. Numbers, which
    are labels without names and names such as "10" alike, are matched by value. If only one side
    has numbers, and they are 0 to n - 1 where the other has n names, they are the positions of
    these names.

    Args:
      data: the classes of the dataset.
      classes: those whose labels are wanted.
      key: the config key of the dataset, for errors.

    Returns:
      The labels, int32 `[data.count]`, and a line on how they were found; empty if both sides
      number their classes alike.

    Raises:
      UserError: a class of the data is not among the others, or several have the same name.
    """
    theirs, ours = data.numbers(), classes.numbers()
    positions = np.arange(data.count, dtype=np.int32)
    if not data.count:  # Images with captions alone.
        return positions, ""
    if data.names is not None and data.names == classes.names:
        return positions, ""
    for one, other in ((data.names, classes.names), (theirs, ours)):
        if one is not None and other is not None and set(one) <= set(other):
            labels = _find(one, other, f"{key}: {data.owner} and {classes.owner}")
            moved = int((labels != positions).sum())
            how = f"{data.owner}: {moved} of {data.count} labels become those that the classes have"
            return labels, f"{how} in {classes.owner}" if moved else ""
    if data.count == classes.count and (theirs is None) != (ours is None):
        numbered, named = (classes, data) if theirs is None else (data, classes)
        numbers = np.array(numbered.numbers(), np.int32)
        if (np.sort(numbers) == positions).all():
            labels = numbers if numbered is data else np.argsort(numbers).astype(np.int32)
            how = f"the classes of {numbered.owner} are numbers, taken as the positions of the"
            return labels, f"{data.owner}: {how} {named.count} names in {named.owner}"
    raise UserError(
        f"{key}: {data.owner} has {data}, {classes.owner} has {classes}: {_lack(data, classes)}"
    )


def _find(theirs: Sequence[Any], ours: Sequence[Any], where: str) -> np.ndarray:
    for side in (theirs, ours):
        ((name, count),) = collections.Counter(side).most_common(1)
        if count > 1:
            raise UserError(
                f"{where} differ in the order of classes, of which {count} are called {name!r}: "
                "expected one of each name"
            )
    label_of = {name: label for label, name in enumerate(ours)}
    return np.array([label_of[name] for name in theirs], np.int32)


def _lack(data: Classes, classes: Classes) -> str:
    if data.names is None or classes.names is None:
        return "expected names on both sides, or the same number of classes"
    known = set(classes.names)
    unknown = [name for name in data.names if name not in known]
    more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
    hint = suggest(unknown[0], classes.names[:1000])[:200]
    return f"the second lacks {unknown[0]!r}{more}; expected the same names{hint}"


def relabel(source: Source, data: Classes, classes: Classes, *, key: str) -> Source:
    """Returns the records of a source with the labels of `match_labels`."""
    labels, _ = match_labels(data, classes, key=key)
    if data.count == classes.count and (labels == np.arange(data.count)).all():
        return source
    return Relabelled(source, labels, num_classes=classes.count)


class Relabelled(Source):
    """Records of another source with new labels.

    Args:
      source: the records.
      labels: the new label of each old one, int32 `[old classes]`.
      num_classes: number of new classes, the width of a label if an example may have several.
    """

    def __init__(self, source: Source, labels: np.ndarray, *, num_classes: int):
        self._source, self._labels, self._num_classes = source, labels, num_classes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        return record | {"label": self._relabel(record["label"])}

    @property
    def reads_ahead(self) -> bool:
        return self._source.reads_ahead

    def ahead(self, indices: Sequence[int], *, captions: bool) -> None:
        self._source.ahead(indices, captions=captions)

    def shards(self) -> Shards | None:
        return self._source.shards()

    def read_through(self, indices: Sequence[int]) -> None:
        self._source.read_through(indices)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(index)

    def _relabel(self, label: Any) -> Any:
        if not np.ndim(label):
            return self._labels[label]
        several = np.zeros(self._num_classes, np.float32)
        several[self._labels] = label
        return several

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def file_name(self, index: int) -> str:
        return self._source.file_name(index)

    def successor(self, index: int) -> int:
        return self._source.successor(index)
