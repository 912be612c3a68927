# SPDX-License-Identifier: Apache-2.0
"""Accuracy among the classes of a dataset that has only some of the model's.

ImageNet-A and ImageNet-R have 200 of the 1,000 classes each, in folders that are named by WordNet
ids. Their labels number these folders, so they must not be compared with the index of a class in
the model: classes are matched by name or by a given map, and the most likely class is searched for
among those of the dataset alone (arXiv:1907.07174, section 3).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.classes import Classes, match_labels
from vit_jax.evaluators.classification import Classification
from vit_jax.objectives.base import Batch, Params
from vit_jax.utils.bounds import read_json
from vit_jax.utils.class_names import normalize_name, read_names
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.suggestions import suggest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset(Classification):
    """Judges the logits of the classes that the dataset has.

    Attributes:
      class_map: a JSON file that maps the name of each class of the dataset to the model's: its
        number, its name, or a list of several of these, of which the largest logit counts
        (ObjectNet). Or a text file with the names of the model's classes, one a line, where the
        weights have none. None to match by the names that the weights have.
    """

    class_map: str | None = None
    # For each class of the dataset, the model's, int32 `[classes, most]`, padded by repetition.
    _groups: np.ndarray | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.info.multi_label or self.real_json is not None:
            raise UserError(
                f"evals.{self.name}.name='subset': expected a dataset with one label an example, "
                "and no real_json, which numbers all classes"
            )
        if self.class_map is not None and not Path(self.class_map).expanduser().is_file():
            raise UserError(
                f"evals.{self.name}.class_map={self.class_map!r}: there is no such file"
            )

    def match(self, classes: Classes, *, key: str) -> tuple["Subset", str]:
        """Finds the model's classes that each class of the dataset stands for."""
        where = f"evals.{self.name}.class_map={self.class_map!r}" if self.class_map else key
        own = Classes.of(self.data.info, str(self.data))
        if self.class_map and self.class_map.endswith(".json"):
            groups = self._read_map(own, classes, where)
        else:
            if self.class_map:
                path = Path(self.class_map).expanduser()
                names = read_names(path, key=where)
                if len(names) != classes.count:
                    raise UserError(
                        f"{where} has {len(names)} names, and {classes.owner} has {classes.count} "
                        "classes: expected a name for each"
                    )
                classes = dataclasses.replace(classes, names=names)
            try:
                labels, _ = match_labels(own, classes, key=where)
            except UserError as e:
                hint = f"evals.{self.name}.class_map maps other names"
                raise e if self.class_map else UserError(f"{e}; {hint}") from None
            groups = [[label] for label in labels.tolist()]
        most = max(map(len, groups))
        found = dataclasses.replace(self)
        padded = np.array([group + group[:1] * (most - len(group)) for group in groups], np.int32)
        object.__setattr__(found, "_groups", padded)
        used = len(np.unique(padded))
        note = f"{own.owner}: {own.count} classes are {used} of {classes.count} in {classes.owner}"
        return found, f"{note}; the most likely one is searched for among these"

    def compute_logits(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the logits of the classes of the dataset, `[batch, classes]`."""
        logits = super().compute_logits(params, batch)
        return logits if self._groups is None else jnp.max(logits[:, self._groups], axis=-1)

    def _read_map(self, own: Classes, classes: Classes, where: str) -> list[list[int]]:
        try:
            content: Any = read_json(Path(self.class_map or "").expanduser())
        except (OSError, ValueError) as e:
            raise UserError(f"{where} can't be read: {describe_error(e)}") from None
        if not isinstance(content, dict):
            raise UserError(
                f"{where}: expected an object from the names of the dataset's classes to the "
                'model\'s, such as {"n01498041": 6}'
            )
        given = {normalize_name(name): value for name, value in content.items()}
        names = own.names or tuple(map(str, range(own.count)))
        missing = [name for name in names if name not in given]
        if missing:
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise UserError(
                f"{where} lacks {missing[0]!r}{more}, of {own.owner}: expected all "
                f"{own.count} of its classes; leave images of others out of the dataset"
                f"{suggest(missing[0], tuple(given)[:1000])[:200]}"
            )
        groups = [self._find(given[name], name, classes, where) for name in names]
        owner: dict[int, str] = {}
        for name, group in zip(names, groups, strict=True):
            for label in group:
                if owner.setdefault(label, name) != name:
                    raise UserError(
                        f"{where}: {owner[label]!r} and {name!r} are both class {label} of the "
                        "model: expected different ones"
                    )
        return groups

    def _find(self, value: Any, name: str, classes: Classes, where: str) -> list[int]:
        labels = []
        for item in value if isinstance(value, list) else [value]:
            label = item
            if isinstance(item, str) and classes.names:
                text = normalize_name(item)
                label = classes.names.index(text) if text in classes.names else None
            if isinstance(label, bool) or not isinstance(label, int):
                raise UserError(
                    f"{where}: {name!r} is {item!r}, which is no class of {classes}: expected a "
                    f"number from 0 to {classes.count - 1}, or a name that the weights have"
                )
            if not 0 <= label < classes.count:
                raise UserError(
                    f"{where}: {name!r} is {label}: expected 0 to {classes.count - 1}, a class of "
                    f"{classes.owner}"
                )
            labels.append(label)
        if not labels:
            raise UserError(f"{where}: {name!r} has no classes: expected at least one")
        return sorted(set(labels))
