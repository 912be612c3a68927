# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name: clipping, a direction, weight decay on kernels, a schedule."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from vit_jax.optim.rules import ParamRules
from vit_jax.optim.schedules import Schedule, make_schedule
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import path_str


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation and what the train step must know beside it.

    Attributes:
      tx: its `init` and the `params` of its `update` take all parameters; gradients, updates and
        state are of those that `rules` leave to be trained.
      schedule: learning rate by number of updates.
      rules: for single parameters.
      accum_steps: micro-batches that make one update.
    """

    tx: optax.GradientTransformation
    schedule: optax.Schedule
    rules: ParamRules
    accum_steps: int


def adamw(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """Adam's direction; with `weight_decay` it is AdamW (arXiv:1711.05101)."""
    for key, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise UserError(f"optimizer.{key}={value}: expected 0 <= value < 1")
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)


def sgd(
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    momentum_dtype: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """Heavy-ball momentum."""
    if not 0 <= momentum < 1:
        raise UserError(f"optimizer.momentum={momentum}: expected 0 <= value < 1")
    return optax.trace(decay=momentum, nesterov=nesterov, accumulator_dtype=momentum_dtype)


DIRECTIONS = {"adamw": adamw, "sgd": sgd}


def make_optimizer(
    *,
    direction: optax.GradientTransformation,
    total_steps: int,
    lr: float,
    schedule: Schedule = "cosine",
    warmup_steps: int = 0,
    end_lr: float = 0.0,
    weight_decay: float = 0.0,
    grad_clip_norm: float | None = None,
    accum_steps: int = 1,
    freeze: tuple[str, ...] = (),
    lr_multipliers: tuple[tuple[str, float], ...] = (),
    layer_decay: float | None = None,
) -> Optimizer:
    """Puts an optimizer together.

    Args:
      direction: from `DIRECTIONS`.
      total_steps: length of the schedule in updates.
      lr: peak learning rate.
      schedule: its shape after the warmup.
      warmup_steps: updates of linear warmup from 0.
      end_lr: learning rate at the end.
      weight_decay: decoupled; each update shrinks kernels by lr x weight_decay. Biases, norms,
        position embeddings and the class token are left alone.
      grad_clip_norm: global norm to which gradients are clipped; None for no clipping.
      accum_steps: micro-batches that the batch is cut into inside a step.
      freeze: regular expressions for whole paths of parameters that stay as they are. They have
        no gradient, no optimizer state and no weight decay.
      lr_multipliers: pairs of such an expression and a factor on the learning rate, and with it
        on weight decay; the first that matches counts, and 1 where none does.
      layer_decay: factor on the learning rate from each layer to the one before it, see
        `rules.layer_decay_factors`; it multiplies with `lr_multipliers`.

    Raises:
      UserError: a value outside its range; by `tx.init`, rules that do not fit the parameters.
    """
    for key, value, least in (
        ("lr", lr, 0),
        ("weight_decay", weight_decay, 0),
        ("end_lr", end_lr, 0),
    ):
        if value < least:
            raise UserError(f"optimizer.{key}={value}: expected at least {least}")
    if accum_steps < 1:
        raise UserError(f"optimizer.accum_steps={accum_steps}: expected at least 1")
    if grad_clip_norm is not None and grad_clip_norm <= 0:
        raise UserError(f"optimizer.grad_clip_norm={grad_clip_norm}: expected above 0, or None")
    rules = ParamRules(tuple(freeze), tuple((p, f) for p, f in lr_multipliers), layer_decay)
    rate = make_schedule(
        lr=lr, total_steps=total_steps, schedule=schedule, warmup_steps=warmup_steps, end_lr=end_lr
    )
    parts = []
    if grad_clip_norm is not None:
        parts.append(optax.clip_by_global_norm(grad_clip_norm))
    parts.append(direction)
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    parts.append(optax.scale_by_learning_rate(rate))
    return Optimizer(_apply_rules(optax.chain(*parts), rules), rate, rules, accum_steps)


def _apply_rules(
    tx: optax.GradientTransformation, rules: ParamRules
) -> optax.GradientTransformation:
    """Keeps frozen parameters from `tx`, and multiplies the updates that it gives."""

    def init(params: Any) -> optax.OptState:
        rules.check(params)
        return tx.init(rules.split(params)[0])

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update(updates, state, rules.split(params)[0])
        factors = rules.lr_factors(params)
        if factors:
            updates = jax.tree_util.tree_map_with_path(
                lambda path, update: factors[path_str(path)] * update, updates
            )
        return updates, state

    return optax.GradientTransformation(init, update)


def decay_mask(params: Any) -> Any:
    """True for kernels, the only parameters that weight decay shrinks."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_str(path).endswith("kernel"), params
    )
