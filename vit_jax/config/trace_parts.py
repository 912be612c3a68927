# SPDX-License-Identifier: Apache-2.0
"""Traces parts from outside of the package, so that their mistakes are found before a run starts.

Nothing is computed: JAX only derives shapes and dtypes.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.base import Evaluator
from vit_jax.objectives.base import Objective
from vit_jax.optim.optimizer import Optimizer
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import is_part, report_failure


def trace_parts(
    names: Mapping[str, str],
    objective: Objective,
    optimizer: Optimizer,
    data: DatasetSpec,
    evaluators: Sequence[tuple[str, Evaluator]] = (),
) -> None:
    """Traces the loss, predictions, the optimizer and evaluators, where they depend on a part.

    Args:
      names: the names of `objective`, `model` and `optimizer` in the config.
      objective: with the model. Its loss is not traced if it has `constants`, which are large.
      optimizer: of the run.
      data: of training.
      evaluators: each with its name in the config.

    Raises:
      UserError: the code of a part fails, or gives something else than the package needs.
    """
    outside = {key: name for key, name in names.items() if is_part(name)}
    judges = [(name, evaluator) for name, evaluator in evaluators if is_part(name)]
    if not outside and not judges:
        return
    key = next((key for key in ("objective", "model", "optimizer") if key in outside), "objective")
    where, name = f"{key}.name={names[key]!r}", names[key]
    one, batch = _make_batch(data, 1), _make_batch(data, data.rows_per_batch)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    with report_failure(where, name):
        params = jax.eval_shape(objective.init, rng, one)
    if not isinstance(params, Mapping):
        raise UserError(
            f"{where}: init gives a {type(params).__name__}; expected a dict of parameters"
        )
    if "objective" in outside:
        with report_failure(where, name):
            _check_outputs(jax.eval_shape(objective.predict, params, one), objective, where)
    traced = "objective" in outside or "model" in outside
    if traced and type(objective).constants is Objective.constants:
        with report_failure(where, name):
            augmented = jax.eval_shape(objective.augment, batch, rng)
            _check_loss(jax.eval_shape(objective.loss, params, augmented, rng), where)
    if "optimizer" in outside:
        with report_failure(f"optimizer.name={names['optimizer']!r}", names["optimizer"]):
            state = jax.eval_shape(optimizer.tx.init, params)
            trained, _ = optimizer.rules.split(params)
            jax.eval_shape(optimizer.tx.update, trained, state, params)
    for name, evaluator in judges:
        where = f"evals.{evaluator.name}.name={name!r}"
        batch = _make_batch(evaluator.data, evaluator.data.batch_size)
        mask = jax.ShapeDtypeStruct((evaluator.data.batch_size,), jnp.float32)
        with report_failure(where, name), contextlib.suppress(NotImplementedError):
            judged = jax.eval_shape(evaluator.judge_batch, params, batch | {"mask": mask})
            _check_columns(judged, evaluator.data.batch_size, where)


def _make_batch(data: DatasetSpec, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {k: jax.ShapeDtypeStruct((size, *v.shape), v.dtype) for k, v in data.blank().items()}


def _check_outputs(given: Any, objective: Objective, where: str) -> None:
    needed = ["logits"] if objective.classifies else []
    needed = ["head_logits"] if objective.head_names else needed
    if not isinstance(given, dict) or not {*needed} <= given.keys():
        expected = "".join(f" with {name!r}" for name in needed)
        raise UserError(f"{where}: predict gives {_show(given)}: expected a dict{expected}")


def _check_columns(given: Any, size: int, where: str) -> None:
    pairs = given if isinstance(given, tuple) and len(given) == 2 else (None, None)
    if not all(isinstance(columns, dict) for columns in pairs):
        wrong = "expected two dicts of columns, of which the first is summed"
    elif any(x.shape[:1] != (size,) for x in jax.tree.leaves(given)):
        wrong = f"expected columns [batch, ...] of a batch of {size}"
    else:
        return
    raise UserError(f"{where}: judge_batch gives {_show(given)}: {wrong}")


def _show(given: Any) -> Any:
    return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", given)


def _check_loss(given: Any, where: str) -> None:
    loss, metrics = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(metrics, dict) or "loss" not in metrics:
        wrong = "expected (loss, metrics), with 'loss' in the dict metrics"
    elif jax.tree.map(_is_float, loss) is not True:
        wrong = "expected (loss, metrics), with a float scalar as loss"
    else:
        return
    raise UserError(f"{where}: loss gives {_show(given)}: {wrong}")


def _is_float(x: jax.ShapeDtypeStruct) -> bool:
    return x.shape == () and bool(jnp.issubdtype(x.dtype, jnp.floating))
