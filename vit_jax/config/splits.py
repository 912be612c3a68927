# SPDX-License-Identifier: Apache-2.0
"""The splits that a config asks for, where the data has none of its own."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.data.sources import find_dataset
from vit_jax.data.sources.base import Dataset
from vit_jax.observe.console import log

_START = re.compile(r"train\[:(\d+%?)\]")


def use_cut(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config that reads the splits into which the package cuts its data.

    A config that trains on `train[:98%]` and evaluates on `train[98%:]` takes its validation off
    the end of `train`, since data may have no split for it. Where the data has no splits at all,
    the package cuts a `validation` off each class (see `make_splits`), so this one is read, and
    `train` as a whole. The change is logged. Anything else stays as it is.

    Args:
      config: the sections by name; `data` and `evals` are checked later.

    Raises:
      UserError: the data is not there.
    """
    data, evals = config["data"], config["evals"]
    name, start = data.get("name"), _START.fullmatch(str(data.get("split")))
    if not start or not isinstance(name, str):
        return dict(config)
    end = f"train[{start[1]}:]"
    changed = {
        key: {**section, "split": "validation"}
        for key, section in evals.items()
        if isinstance(section, Mapping)
        and section.get("split") == end
        and section.get("data_name") in (None, name)
    }
    if not changed:
        return dict(config)
    dataset = find_dataset(name, data_dir=data.get("data_dir"))
    if not isinstance(dataset, Dataset) or not dataset.cut:
        return dict(config)
    split = data["split"]
    others = "".join(f", evals.{key}.split={end!r} is validation" for key in changed)
    _log_once(f"{name}: as it has a validation split, data.split={split!r} is train{others}")
    return {**config, "data": {**data, "split": "train"}, "evals": {**evals, **changed}}


@functools.cache
def _log_once(text: str) -> None:
    """Logs a change of a config that is built several times, as to check a workdir."""
    log(text)
