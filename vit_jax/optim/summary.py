# SPDX-License-Identifier: Apache-2.0
"""A readable summary of what an optimizer does with the parameters of a model."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vit_jax.optim.optimizer import Optimizer
from vit_jax.utils.tree import flatten


@dataclasses.dataclass(frozen=True)
class ParamSummary:
    """How one parameter is trained; its path is as in `utils.tree`.

    Attributes:
      decayed: whether weight decay applies.
      lr_factors: smallest and largest factor on the learning rate; scanned blocks have several.
      schedule: expression of its own schedule; None for that of the optimizer.
    """

    path: str
    shape: tuple[int, ...]
    frozen: bool
    decayed: bool
    lr_factors: tuple[float, float]
    schedule: str | None


def summarize_params(optimizer: Optimizer, params: Any) -> list[ParamSummary]:
    """Returns a `ParamSummary` for each parameter (array or shape), in the order of the tree."""
    rules = optimizer.rules
    trained = flatten(rules.split(params)[0])
    mask, factors = flatten(rules.decay_mask(params)), rules.lr_factors(params)
    decays, rows = optimizer.weight_decay or optimizer.weight_decay_end, []
    for path, leaf in flatten(params).items():
        frozen, index = path not in trained, rules.schedule_index(path)
        factor = np.asarray(factors.get(path, 1.0), np.float64)
        rows.append(
            ParamSummary(
                path=path,
                shape=leaf.shape,
                frozen=frozen,
                decayed=bool(decays and mask[path] and not frozen),
                lr_factors=(0.0, 0.0) if frozen else (float(factor.min()), float(factor.max())),
                schedule=None if index is None or frozen else rules.schedules[index],
            )
        )
    return rows


def group_params(rows: Iterable[ParamSummary]) -> list[tuple[str, ...]]:
    """Returns rows `what, arrays, parameters, decay, lr`, one for all that are treated alike."""
    groups: dict[tuple[Any, ...], list[ParamSummary]] = {}
    for row in rows:
        groups.setdefault((row.frozen, not row.decayed, row.schedule or ""), []).append(row)
    lines = []
    for (frozen, no_decay, schedule), members in sorted(groups.items()):
        least = min(row.lr_factors[0] for row in members)
        most = max(row.lr_factors[1] for row in members)
        factor = f"x {most:.4g}" if math.isclose(least, most) else f"x {least:.4g} to {most:.4g}"
        lines.append(
            (
                f"schedule of {schedule}" if schedule else "frozen" if frozen else "trained",
                f"{len(members):,}",
                f"{sum(math.prod(row.shape) for row in members):,}",
                "no" if no_decay else "yes",
                "" if frozen else factor,
            )
        )
    return lines


def describe_params(rows: Sequence[ParamSummary]) -> dict[str, Any]:
    """Returns what `run.json` has of the parameters: paths and shapes, and `group_params`."""
    return {
        "params": [{"path": row.path, "shape": list(row.shape)} for row in rows],
        "groups": [list(line) for line in group_params(rows)],
    }


def describe_rates(optimizer: Optimizer) -> list[str]:
    """Returns lines with the effective learning rate, and the weight decay in both conventions."""
    text = f"learning rate: peak {optimizer.peak_lr:.4g}"
    if optimizer.scaled_to is not None:
        ratio = optimizer.peak_lr / optimizer.lr if optimizer.lr else 1.0
        base, batch = optimizer.scaled_to
        text += f" for batches of {batch}: {optimizer.lr:.4g} for {base}, times {ratio:.4g}"
    decay, end = optimizer.weight_decay, optimizer.weight_decay_end
    if not decay and not end:
        return [text, "weight decay: none"]
    if end is not None:
        return [text, f"weight decay: {decay:.4g} to {end:.4g} x learning rate"]
    by_schedule = decay * optimizer.peak_lr
    return [text, f"weight decay: {decay:.4g} x learning rate = {by_schedule:.4g} x schedule"]
