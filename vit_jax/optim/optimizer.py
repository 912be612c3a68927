# SPDX-License-Identifier: Apache-2.0
"""An optimizer from its parts: clipping, a base optimizer, weight decay, rates and a schedule."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from vit_jax.optim.base_optimizers import BaseOptimizer
from vit_jax.optim.norms import clip_by_global_norm
from vit_jax.optim.rules import DECAYED, ParamRules
from vit_jax.optim.sam import Sam
from vit_jax.optim.schedules import ScheduleOptions, cosine_between
from vit_jax.utils.durations import Clock, count_steps
from vit_jax.utils.errors import UserError
from vit_jax.utils.registry import bind, takes_options_of
from vit_jax.utils.tree import merge, partition, path_str

LrScaling = Literal["none", "linear", "sqrt"]
DecayTimes = Literal["lr", "schedule"]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation, and what the train step needs beside it.

    Attributes:
      tx: takes all parameters in `init` and as `params` of `update`; its gradients, updates and
        state have only the parameters that `rules` leave to be trained.
      schedule: the learning rate as a function of the number of updates.
      rules: which parameters are trained, and how fast.
      accum_steps: number of micro-batches per update.
      peak_lr: peak of the schedule, scaled to the batch size.
      lr: the learning rate of the config.
      scaled_to: the batch size that `lr` is for, and that of the run; None for no scaling.
      weight_decay: factor on parameters, which is multiplied by the learning rate.
      weight_decay_end: that of the last update; None for the same.
      sam: sharpness-aware minimisation in the train step; None for the plain gradient.
      averaging: as in `BaseOptimizer`.
      sharded: whether parameters, gradients or the state of `tx` are split over devices.
    """

    tx: optax.GradientTransformation
    schedule: optax.Schedule
    rules: ParamRules
    accum_steps: int
    peak_lr: float
    lr: float
    scaled_to: tuple[int, float] | None
    weight_decay: float
    weight_decay_end: float | None = None
    sam: Sam | None = None
    averaging: float | None = None
    sharded: bool = False

    def gradient_point(self, opt_state: Any, trained: Any) -> Any:
        """Returns the parameters at which gradients are taken, given the state of `tx`.

        These are the trained ones, which schedule-free optimizers move towards the iterates.
        """
        if self.averaging is None:
            return trained
        return _interpolate(trained, opt_state.z, self.averaging)


@takes_options_of(ScheduleOptions)
def make_optimizer(
    *,
    base: BaseOptimizer,
    total_steps: int,
    clock: Clock | None = None,
    sharded: bool = False,
    lr: float,
    lr_scaling: LrScaling = "none",
    base_batch_size: int | None = None,
    weight_decay: float = 0.0,
    weight_decay_end: float | None = None,
    weight_decay_times: DecayTimes = "lr",
    weight_decay_params: tuple[str, ...] = DECAYED,
    grad_clip_norm: float | None = None,
    grad_clip_groups: tuple[str, ...] = (),
    accum_steps: int = 1,
    freeze: tuple[str, ...] = (),
    train_after: tuple[tuple[str, dict], ...] = (),
    lr_multipliers: tuple[tuple[str, float], ...] = (),
    layer_decay: float | None = None,
    schedules: tuple[tuple[str, dict], ...] = (),
    sam: dict | None = None,
    **options: Any,
) -> Optimizer:
    """Makes an `Optimizer` from config values.

    Args:
      base: a base optimizer, from `BASE_OPTIMIZERS`.
      total_steps: length of the schedule in updates.
      clock: batch size and length of an epoch; required by `lr_scaling` and by durations in epochs
        or examples.
      sharded: whether parameters, gradients or their state are split over devices.
      lr: peak learning rate.
      lr_scaling: how `lr` follows the batch size: times data.batch_size / base_batch_size
        ("linear"), the square root of that ("sqrt"), or not at all ("none").
      base_batch_size: batch size that `lr` is for.
      weight_decay: decoupled weight decay.
      weight_decay_end: weight decay at the end of the run, along half a cosine; None for the same.
      weight_decay_times: factor on the weight decay of each update: "lr", or "schedule", which is
        the learning rate over its peak. Multipliers of single parameters apply to "lr" only.
      weight_decay_params: regular expressions for whole paths of parameters that decay; by default
        kernels, but no biases, norms, position embeddings and class tokens.
      grad_clip_norm: global norm to which gradients are clipped; None for no clipping.
      grad_clip_groups: expressions of parameters whose gradients are clipped together, each by the
        norm of its own; those that match none are one more group. By default all are one.
      accum_steps: number of micro-batches into which a step cuts the batch.
      freeze: expressions of parameters that are not trained. They have no gradient, no optimizer
        state and no weight decay.
      train_after: pairs of an expression and a duration, such as `{"epochs": 1}`, before which
        the parameters stay as they are; the first match counts.
      lr_multipliers: pairs of an expression and a factor on the learning rate; the first match
        counts, and the factor is 1 without a match.
      layer_decay: factor on the learning rate from each layer to the one before it, see
        `rules.layer_decay_factors`; it multiplies with `lr_multipliers`.
      schedules: pairs of an expression and the options of a schedule that differ; the first match
        counts.
      sam: the options of `Sam`; None for the plain gradient.
      **options: the options of the schedule, see `ScheduleOptions`.

    Raises:
      UserError: a value is out of its range; `tx.init` raises it if rules do not fit the
        parameters.
    """
    least = {"lr": (lr, 0), "weight_decay": (weight_decay, 0), "accum_steps": (accum_steps, 1)}
    if weight_decay_end is not None:
        least["weight_decay_end"] = (weight_decay_end, 0)
    for key, (value, minimum) in least.items():
        if value < minimum:
            raise UserError(f"optimizer.{key}={value}: expected at least {minimum}")
    if grad_clip_norm is not None and grad_clip_norm <= 0:
        raise UserError(f"optimizer.grad_clip_norm={grad_clip_norm}: expected above 0, or None")
    if grad_clip_groups and grad_clip_norm is None:
        raise UserError(
            f"optimizer.grad_clip_groups={grad_clip_groups}: expected optimizer.grad_clip_norm too"
        )
    if weight_decay_end is not None and base.after_decay is not None:
        raise UserError(
            f"optimizer.weight_decay_end={weight_decay_end}: this optimizer scales the decay with "
            "its update; expected None"
        )
    rules = ParamRules(
        tuple(freeze),
        tuple((p, f) for p, f in lr_multipliers),
        layer_decay,
        tuple(weight_decay_params),
        tuple(pattern for pattern, _ in schedules),
        tuple(pattern for pattern, _ in train_after),
        tuple(grad_clip_groups),
    )
    peak = lr * _batch_factor(lr_scaling, base_batch_size, clock)
    own = ScheduleOptions(**options)
    others = [own.replace(changes, key="optimizer.schedules") for _, changes in schedules]
    rates = [o.make(lr=peak, total_steps=total_steps, clock=clock) for o in (own, *others)]
    if base.averaging is not None:
        _check_schedule_free([own, *others])
    decay = _relative_decay(weight_decay, weight_decay_times, peak, base)
    end = None
    if weight_decay_end is not None:
        end = _relative_decay(weight_decay_end, weight_decay_times, peak, base)
    starts = [
        count_steps(
            duration,
            key=f"optimizer.train_after: {pattern!r}",
            clock=clock,
            total_steps=total_steps,
            unless="these parameters would never be trained",
        )
        for pattern, duration in train_after
    ]
    clip = None
    if grad_clip_norm is not None:
        clip = _clip(grad_clip_norm, rules, sharded=sharded)
    tx = _make_chain(
        base,
        decay,
        rates,
        rules,
        clip,
        decay_schedule=None if end is None else cosine_between(decay, end, total_steps),
        starts=starts,
        multiply_first=weight_decay_times != "lr",
    )
    return Optimizer(
        tx=_apply_rules(tx, rules),
        schedule=rates[0],
        rules=rules,
        accum_steps=accum_steps,
        peak_lr=peak,
        lr=lr,
        scaled_to=(base_batch_size, clock.batch_size) if base_batch_size and clock else None,
        weight_decay=decay,
        weight_decay_end=end,
        sam=None if sam is None else Sam(**bind(sam, Sam, key="optimizer.sam")[0]),
        averaging=base.averaging,
        sharded=sharded,
    )


def _make_chain(
    base: BaseOptimizer,
    decay: float,
    rates: list[optax.Schedule],
    rules: ParamRules,
    clip: optax.GradientTransformation | None,
    *,
    decay_schedule: optax.Schedule | None,
    starts: list[int],
    multiply_first: bool,
) -> optax.GradientTransformation:
    """Chains all parts; multipliers that do not apply to weight decay come before it."""
    clips = [] if clip is None else [clip]
    multiplied = rules.lr_multipliers or rules.layer_decay is not None
    scale = [_scale_by_factors()] if multiplied else []
    shrink = []
    if decay or decay_schedule is not None:
        shrink = [optax.add_decayed_weights(decay_schedule or decay, mask=rules.decay_mask)]
    after = [base.after_decay(rules.decay_mask, decay)] if base.after_decay else []
    if shrink and multiply_first:
        scale, shrink = [], [*scale, *shrink]
    hold = [_hold(starts, rules)] if starts else []
    tx = optax.chain(*clips, base.tx, *shrink, *after, _scale_by_rates(rates, rules), *scale, *hold)
    if base.averaging is None:
        return tx
    return _schedule_free(tx, rates[0], base.averaging)


def _batch_factor(scaling: LrScaling, base: int | None, clock: Clock | None) -> float:
    if scaling == "none":
        if base is not None:
            raise UserError(
                f"optimizer.base_batch_size={base}: expected optimizer.lr_scaling='linear' or "
                "'sqrt' with it"
            )
        return 1.0
    if base is None or base < 1:
        raise UserError(
            f"optimizer.lr_scaling={scaling!r} with optimizer.base_batch_size={base}: expected the "
            "batch size that optimizer.lr is for"
        )
    assert clock is not None
    ratio = clock.batch_size / base
    return ratio if scaling == "linear" else ratio**0.5


def _relative_decay(decay: float, times: DecayTimes, peak: float, base: BaseOptimizer) -> float:
    """Returns the weight decay to multiply by the learning rate."""
    if times == "lr" or not decay:
        return decay
    if base.after_decay is not None:
        raise UserError(
            "optimizer.weight_decay_times='schedule': this optimizer scales the decay with its "
            "update; expected 'lr'"
        )
    if not peak:
        raise UserError("optimizer.weight_decay_times='schedule': expected optimizer.lr above 0")
    return decay / peak


def _check_schedule_free(options: list[ScheduleOptions]) -> None:
    own, *others = options
    cooled = any(v for k, v in vars(own).items() if k.startswith("cooldown"))
    if own.schedule != "constant" or cooled or others:
        raise UserError(
            f"optimizer.schedule={own.schedule!r}: a schedule-free optimizer has none but a warmup;"
            " expected 'constant', no cooldown and no optimizer.schedules"
        )


def _apply_rules(
    tx: optax.GradientTransformation, rules: ParamRules
) -> optax.GradientTransformation:
    """Hides frozen parameters from `tx`, and passes it the multipliers of the others."""
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> optax.OptState:
        rules.check(params)
        return inner.init(rules.split(params)[0])

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, Any]:
        # From all parameters, because the depth of a model includes its frozen layers.
        factors = rules.lr_factors(params)
        return inner.update(updates, state, rules.split(params)[0], factors=factors)

    return optax.GradientTransformation(init, update)


def _scale_by_factors() -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def scale(path: Any, update: jax.Array) -> jax.Array:
            return extra["factors"][path_str(path)] * update

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _scale_by_rates(rates: list[optax.Schedule], rules: ParamRules) -> optax.GradientTransformation:
    """Multiplies by minus the learning rate, which is `rates[0]` or that of `rules.schedules`."""
    if len(rates) == 1:
        return optax.scale_by_learning_rate(rates[0])

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        now = [jnp.asarray(rate(state.count)) for rate in rates]

        def scale(path: Any, update: jax.Array) -> jax.Array:
            index = rules.schedule_index(path_str(path))
            rate = now[0 if index is None else index + 1]
            return jnp.asarray(-rate, update.dtype) * update

        scaled = jax.tree_util.tree_map_with_path(scale, updates)
        return scaled, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)), update
    )


def _clip(norm: float, rules: ParamRules, *, sharded: bool) -> optax.GradientTransformation:
    """Clips the gradients of each of the groups of `rules` to a norm."""
    whole = clip_by_global_norm(norm, sharded=sharded)
    if not rules.clip_groups:
        return whole

    def clip(part: Any) -> Any:
        return whole.update(part, optax.EmptyState())[0] if jax.tree.leaves(part) else part

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rest: Any = updates
        clipped: Any = {}
        for group in range(len(rules.clip_groups)):
            part, rest = partition(rest, lambda path, g=group: rules.clip_group(path) == g)
            clipped = merge(clipped, clip(part))
        return merge(clip(rest), clipped), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _hold(starts: list[int], rules: ParamRules) -> optax.GradientTransformation:
    """Makes updates 0 before that of the same index in `starts`, counted from 0."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def hold(path: Any, update: jax.Array) -> jax.Array:
            index = rules.start_index(path_str(path))
            if index is None:
                return update
            return jnp.where(state.count >= starts[index], update, 0)

        held = jax.tree_util.tree_map_with_path(hold, updates)
        return held, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)), update
    )


def _interpolate(x: Any, z: Any, b1: float) -> Any:
    return jax.tree.map(lambda x, z: b1 * x + (1 - b1) * z, x, z)


def _schedule_free(
    tx: optax.GradientTransformation, rate: optax.Schedule, b1: float
) -> optax.GradientTransformation:
    """Makes a schedule-free optimizer whose parameters are the average x.

    The parameters of optax's version are the points y at which gradients are taken. With x in the
    train state, evaluation, averages, checkpoints and exports need no conversion.
    """
    # optax counts updates from 1.
    inner = contrib.schedule_free(tx, lambda count: rate(count - 1), b1=b1)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        point = _interpolate(params, state.z, b1)
        updates, state = inner.update(updates, state, point, **extra)
        after = contrib.schedule_free_eval_params(state, optax.apply_updates(point, updates))
        return jax.tree.map(jnp.subtract, after, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
