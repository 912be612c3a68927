# SPDX-License-Identifier: Apache-2.0
"""Configs reduced to what planning, evaluation or a benchmark needs of a run."""

import copy
from collections.abc import Mapping
from typing import Any

from vit_jax.utils.errors import UserError

# Longer than any warm-up. The length of a run is only a constant of the learning rate schedule.
_STEPS = 10**7


def reduce_for_planning(
    config: Mapping[str, Any], *, num_classes: int | None = None, image_size: int | None = None
) -> dict[str, Any]:
    """Returns a config without evaluators, checkpoints and, if sizes are given, the dataset.

    Args:
      config: the config of a run.
      num_classes: replaces the dataset by blank images of so many classes, so that it need not be
        available.
      image_size: pixels of the side of those images, in place of what `data.preprocess` gives.

    Raises:
      UserError: an image size without a number of classes, or one of them is below 1.
    """
    for name, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected at least 1")
    if num_classes is None and image_size is not None:
        raise UserError(f"--image_size={image_size}: expected --num_classes with it")
    config = copy.deepcopy(dict(config))
    for key in ("evals", "checkpoint", "stop", "init_from", "profile"):
        config.pop(key, None)
    if config.pop("epochs", None) is not None:
        config["total_steps"] = _STEPS
    data = config.get("data")
    if num_classes is not None and isinstance(data, dict):
        data.pop("mixture", None)
        size = "" if image_size is None else f",{image_size}"
        data |= {"name": f"blank:{num_classes}{size}", "split": "train"}
        if image_size is not None:
            data["preprocess"] = "decode"
    return config


def reduce_for_evaluation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without what only training needs.

    `adapt.dont_load` is removed too: a checkpoint of the run has all parameters, those that the run
    re-initialised among them. So is `lora`, since adapters are added when weights are read.
    """
    adapt = {k: v for k, v in (config.get("adapt") or {}).items() if k != "dont_load"}
    unused = dict.fromkeys(("init_from", "lora", "checkpoint", "stop", "profile", "tracking"))
    return {**config, "adapt": adapt, **unused}


def reduce_for_timing(config: Mapping[str, Any], *, steps: int) -> dict[str, Any]:
    """Returns a config of a few steps, which logs once, after the last one.

    Warm-up and cool-down are removed, since they may be longer than these steps.
    """
    lasting = ("warmup_", "cooldown_")
    optimizer = {k: v for k, v in config["optimizer"].items() if not k.startswith(lasting)}
    return {**config, "total_steps": steps, "log_every": steps, "optimizer": optimizer}


def without_mesh(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config that fits any number of devices: all of them hold copies of the model."""
    return {**config, "mesh": {}}
