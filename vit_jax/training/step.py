# SPDX-License-Identifier: Apache-2.0
"""Initialises the train state, and updates it by one step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.checkpoint.state import TrainState
from vit_jax.objectives.base import Batch, CoupledObjective, Objective, Params
from vit_jax.optim import averages
from vit_jax.optim.averages import EmaWarmup
from vit_jax.optim.norms import global_norm, norms
from vit_jax.optim.optimizer import Optimizer
from vit_jax.utils.tree import flatten, merge


def init_rng(seed: int) -> jax.Array:
    """The key of the initial parameters; a scalar key array."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def step_rng(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of all random choices of the step after `step` updates; a scalar key array."""
    return jax.random.fold_in(jax.random.key(seed), step + 1)


def init_state(
    rng: jax.Array,
    batch: Batch,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    ema: bool,
    params: Params = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      rng: key of the initial parameters.
      batch: arrays of the shapes and dtypes of a batch; the number of examples does not matter.
      objective: initialises the parameters.
      tx: initialises the optimizer state.
      ema: whether to keep an average of the parameters.
      params: parameters to start from, such as those of a checkpoint; None to initialise them.
    """
    start: Params = objective.init(rng, batch) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=start,
        opt_state=tx.init(start),
        # A copy: a donated state must not alias buffers.
        ema_params=jax.tree.map(jnp.copy, start) if ema else None,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    constants: Params = None,
    *,
    objective: Objective,
    optimizer: Optimizer,
    ema_decay: float | None,
    ema_warmup: EmaWarmup = "count",
    seed: int,
    split: Callable[[jax.Array], jax.Array] = lambda x: x,
    scatter: Callable[[Params], Params] = lambda x: x,
    on_divergence: str | None = None,
    max_loss: float | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one more update, and its metrics.

    All randomness is a function of (seed, step).

    Args:
      state: is donated by the caller.
      batch: a global batch of the data: `image` uint8 `[batch, height, width, 3]` and `label` int32
        `[batch]`, or `[batch, classes]` if examples have several labels.
      constants: arrays of the objective that are not trained, on the mesh.
      objective: gives the loss.
      optimizer: its `accum_steps` splits the batch into micro-batches of equal size.
      ema_decay: decay of the parameter average; None for no average, or for one by the objective.
      ema_warmup: how the decay rises to it, see `averages.ema_decay`.
      seed: of the run.
      split: places arrays `[micro-batches, batch, ...]` on the mesh.
      scatter: places the gradients on the mesh.
      on_divergence: with `skip`, a step with a metric that is not finite changes nothing but the
        step number and what follows the average. Any policy adds the metric `grad_norms`, float32
        `[layers]`, in the order of `layer_names`.
      max_loss: a higher loss counts as diverged too.

    Returns:
      The new state, and the float32 scalars `loss, lr, grad_norm, param_norm`. `grad_norm` is over
      the trained parameters, `param_norm` over all but those that are stored as int8. With SAM,
      `loss` is that of the parameters themselves, and `grad_norm` that of the gradient that updates
      them.
    """
    augment_rng, loss_rng = jax.random.split(step_rng(seed, state.step))
    batch = objective.augment(batch, augment_rng)
    trained, frozen = optimizer.rules.split(state.params)

    given = {**(constants or {}), **objective.step_inputs(state.step, state.ema_params)}

    # Functions of the trained parameters alone: the frozen ones need no backward pass.
    def complete(params: Params) -> Params:
        return {**merge(params, frozen), **given}

    def loss(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Any]:
        return objective.loss(complete(params), batch, rng)

    gradients: Any = functools.partial(accumulate_gradients, loss)
    if isinstance(objective, CoupledObjective) and optimizer.accum_steps > 1:
        gradients = functools.partial(
            couple_gradients,
            lambda params, *rest: objective.encode(complete(params), *rest),
            lambda params, encoded: objective.combine(complete(params), encoded),
        )
    gradients = functools.partial(
        gradients, batch=batch, rng=loss_rng, steps=optimizer.accum_steps, split=split
    )
    lr = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
    point = optimizer.gradient_point(state.opt_state, trained)
    grads, metrics = gradients(point)
    if sam := optimizer.sam:
        radius = sam.radius(lr / (optimizer.peak_lr or 1))
        perturbed, _ = gradients(sam.perturb(point, grads, radius))
        grads = sam.combine(grads, perturbed)
    grads = scatter(grads)
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
    trained = optax.apply_updates(trained, updates)
    statistics = metrics
    params, metrics = objective.update_statistics(merge(trained, frozen), statistics)
    metrics |= {
        "lr": lr,
        "grad_norm": global_norm(grads, sharded=optimizer.sharded),
        "param_norm": global_norm(_floats(params), sharded=optimizer.sharded, updated=True),
    }
    ema_params = state.ema_params
    if ema_params is not None:
        if ema_decay is None:
            decay = objective.average_decay(state.step)
        else:
            decay = averages.ema_decay(state.step, ema_decay, ema_warmup)
        average, same = optimizer.rules.split(state.ema_params)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, trained)
        ema_params, _ = objective.update_statistics(merge(average, same), statistics)
    new: Any = (params, opt_state, ema_params)
    if on_divergence == "skip":
        good = jnp.all(jnp.isfinite(jnp.stack([jnp.float32(x) for x in metrics.values()])))
        if max_loss is not None:
            good &= metrics["loss"] <= max_loss
        old = (state.params, state.opt_state, state.ema_params)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    if on_divergence is not None:
        metrics["grad_norms"] = _norms_by_layer(grads, sharded=optimizer.sharded)
    new_state = follow_average(TrainState(state.step, *new), state.step + 1, objective=objective)
    return new_state, metrics


def follow_average(state: TrainState, step: jax.Array | int, *, objective: Objective) -> TrainState:
    """Sets the number of updates, and makes the copies of the average that are due until then.

    Args:
      state: with the number of updates before.
      step: number of updates to set, an int32 scalar.
      objective: see `Objective.follow_average`.
    """
    params, average = state.params, state.ema_params
    if average is not None:
        params, average = objective.follow_average(params, average, state.step, step)
    return TrainState(jnp.asarray(step, jnp.int32), params, state.opt_state, average)


def _floats(params: Params) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(params) if x.dtype != jnp.int8]


def layer_names(params: Params) -> list[str]:
    """The layers of a tree of parameters: `embedding`, `Transformer/encoderblock_0` and so on."""
    return sorted({_layer(path) for path in flatten(params)})


def _layer(path: str) -> str:
    parts = path.split("/")[:-1] or [path]
    depths = (depth for depth, part in enumerate(parts, 1) if "encoderblock" in part)
    return "/".join(parts[: next(depths, 1)])


def _norms_by_layer(grads: Params, *, sharded: bool) -> jax.Array:
    groups: dict[str, list[jax.Array]] = {layer: [] for layer in layer_names(grads)}
    for path, leaf in flatten(grads).items():
        groups[_layer(path)].append(leaf)
    return norms(list(groups.values()), sharded=sharded)


def accumulate_gradients(
    loss: Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    params: Params,
    batch: Batch,
    rng: jax.Array,
    *,
    steps: int,
    split: Callable[[jax.Array], jax.Array],
) -> tuple[Params, dict[str, jax.Array]]:
    """Mean gradient of `loss`, and its mean metrics, over `steps` micro-batches in turn.

    Args:
      loss: gives a float32 scalar to be differentiated, and float32 scalars by name.
      params: the pytree to differentiate with respect to.
      batch: arrays `[batch, ...]`, of which `steps` divides the first dimension.
      rng: key; micro-batch i gets `fold_in(rng, i)`.
      steps: number of micro-batches; with 1, the batch and the key are used as they are.
      split: places arrays `[steps, batch / steps, ...]` on the mesh.
    """
    grad_fn = jax.grad(loss, has_aux=True)
    if steps == 1:
        return grad_fn(params, batch, rng)

    def body(total: Any, xs: Any) -> tuple[Any, None]:
        i, micro = xs
        out = grad_fn(params, micro, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, out), None

    micro = _cut(batch, steps, split)
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], micro), rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(steps), micro))
    return jax.tree.map(lambda x: x / steps, total)


def couple_gradients(
    encode: Callable[[Params, Batch, jax.Array], Any],
    combine: Callable[[Params, Any], tuple[jax.Array, dict[str, jax.Array]]],
    params: Params,
    batch: Batch,
    rng: jax.Array,
    *,
    steps: int,
    split: Callable[[jax.Array], jax.Array],
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient of one loss of a whole batch that is encoded in micro-batches, and its metrics.

    It is that of the large batch, with the memory of a micro-batch: the forward pass keeps only the
    encoded rows, and the backward pass encodes each micro-batch again, with the same key, before it
    differentiates it. Source: arXiv:2101.06983 (GradCache).

    Args:
      encode: gives a pytree of arrays `[rows, ...]` for as many rows of a batch.
      combine: gives a float32 scalar to be differentiated, and float32 scalars by name, from the
        encoded rows of the batch, in its order.
      params, batch, rng, steps, split: as in `accumulate_gradients`.
    """
    micro = _cut(batch, steps, split)
    encode = jax.checkpoint(encode)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        def body(_: None, xs: Any) -> tuple[None, Any]:
            i, micro = xs
            return None, encode(params, micro, jax.random.fold_in(rng, i))

        _, encoded = jax.lax.scan(body, None, (jnp.arange(steps), micro))
        return combine(params, jax.tree.map(join, encoded))

    return jax.grad(loss, has_aux=True)(params)


def _cut(batch: Batch, steps: int, split: Callable[[jax.Array], jax.Array]) -> Batch:
    """Arrays `[steps, batch / steps, ...]` of micro-batches.

    Each has every steps-th row, so that it is sharded over all devices like the batch.
    """
    return jax.tree.map(
        lambda x: split(x.reshape(x.shape[0] // steps, steps, *x.shape[1:]).swapaxes(0, 1)), batch
    )
