# SPDX-License-Identifier: Apache-2.0
"""Traces parts from outside of the package, so that their mistakes are found before a run starts.

Nothing is computed: JAX only derives shapes and dtypes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.objectives.base import Objective
from vit_jax.optim.optimizer import Optimizer
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import is_part, report_failure


def trace_parts(
    names: Mapping[str, str], objective: Objective, optimizer: Optimizer, data: DatasetSpec
) -> None:
    """Traces the loss and the optimizer if the model, the objective or the optimizer is a part.

    Args:
      names: the names of `objective`, `model` and `optimizer` in the config.
      objective: with the model. Its loss is not traced if it has `constants`, which are large.
      optimizer: of the run.
      data: of training.

    Raises:
      UserError: the code of a part fails, or gives something else than the package needs.
    """
    outside = {key: name for key, name in names.items() if is_part(name)}
    if not outside:
        return
    key = next(key for key in ("objective", "model", "optimizer") if key in outside)
    where, name = f"{key}.name={names[key]!r}", names[key]
    one, batch = (
        {k: jax.ShapeDtypeStruct((n, *v.shape), v.dtype) for k, v in data.blank().items()}
        for n in (1, data.batch_size)
    )
    rng = jax.eval_shape(lambda: jax.random.key(0))
    with report_failure(where, name):
        params = jax.eval_shape(objective.init, rng, one)
    if not isinstance(params, Mapping):
        raise UserError(
            f"{where}: init gives a {type(params).__name__}; expected a dict of parameters"
        )
    if key != "optimizer" and type(objective).constants is Objective.constants:
        with report_failure(where, name):
            augmented = jax.eval_shape(objective.augment, batch, rng)
            _check_loss(jax.eval_shape(objective.loss, params, augmented, rng), where)
    if "optimizer" in outside:
        with report_failure(f"optimizer.name={names['optimizer']!r}", names["optimizer"]):
            state = jax.eval_shape(optimizer.tx.init, params)
            trained, _ = optimizer.rules.split(params)
            jax.eval_shape(optimizer.tx.update, trained, state, params)


def _check_loss(given: Any, where: str) -> None:
    loss, metrics = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(metrics, dict) or "loss" not in metrics:
        wrong = "expected (loss, metrics), with 'loss' in the dict metrics"
    elif jax.tree.map(_is_float, loss) is not True:
        wrong = "expected (loss, metrics), with a float scalar as loss"
    else:
        return
    shown = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", given)
    raise UserError(f"{where}: loss gives {shown}: {wrong}")


def _is_float(x: jax.ShapeDtypeStruct) -> bool:
    return x.shape == () and bool(jnp.issubdtype(x.dtype, jnp.floating))
