# SPDX-License-Identifier: Apache-2.0
"""An estimate of the memory that a step needs on each device, without compiling it.

State and batch are exact. Activations are what differentiation saves for the backward pass in the
traced program; the compiler merges some of them and pads others.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.parallel.mesh import count_batch_shards
from vit_jax.planning.compiled import device_bytes
from vit_jax.training.experiment import Experiment
from vit_jax.utils.tree import merge


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device: state and batch, gradients, and activations for the backward pass.

    `constants` are those of the objective, such as the parameters of a teacher.
    """

    params: int
    opt_state: int
    ema_params: int
    constants: int
    batch: int
    gradients: int
    activations: int

    @property
    def arguments(self) -> int:
        """State, constants and batch: the arguments of the step."""
        return self.params + self.opt_state + self.ema_params + self.constants + self.batch


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes saved for one image: the part that tensor parallelism splits, and the rest."""

    split: float
    whole: float


def estimate_memory(experiment: Experiment, activations: Activations | None = None) -> Memory:
    """Estimates the memory of a training step.

    Args:
      experiment: on its mesh.
      activations: of an experiment with the same model, if they are known; None counts them.
    """
    state = experiment.abstract_state
    trained, _ = experiment.optimizer.rules.split(state.params)
    accum_steps = experiment.optimizer.accum_steps
    saved = activations or count_activations(experiment)
    mesh = experiment.mesh.shape
    images = (
        experiment.train_data.rows_per_batch / accum_steps / count_batch_shards(experiment.mesh)
    )
    return Memory(
        params=_sum(state.params),
        opt_state=_sum(state.opt_state) + _sum(state.step),
        ema_params=_sum(state.ema_params),
        constants=_sum(experiment.abstract_constants),
        batch=_sum(experiment.abstract_batch),
        # The gradients of a micro-batch and, with several, their sum.
        gradients=_sum(trained) * (2 if accum_steps > 1 else 1),
        activations=round(images * (saved.whole + saved.split / mesh["tensor"])),
    )


def count_activations(experiment: Experiment) -> Activations:
    """Counts what the forward pass saves for the backward pass, for each image."""
    saved = _count_saved(experiment, experiment.objective)
    model: Any = experiment.model
    objective: Any = experiment.objective
    found = saved
    for part, tower in getattr(model, "towers", {"": model}).items():
        if getattr(tower, "remat", "none") == "none" or not hasattr(tower, "num_layers"):
            continue
        # The activations of one block at a time exist again while it is recomputed.
        kept = tower.clone(remat="none")
        kept = _count_saved(
            experiment,
            dataclasses.replace(objective, model=model.clone(**{part: kept}) if part else kept),
        )
        if part:  # What the other tower saves does not count.
            kept = Activations(kept.split - saved.split, kept.whole - saved.whole)
        layers = tower.num_layers
        found = Activations(found.split + kept.split / layers, found.whole + kept.whole / layers)
    return found


def _sum(tree: Any) -> int:
    return sum(device_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _count_saved(experiment: Experiment, objective: Any) -> Activations:
    rng = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(objective.augment, experiment.abstract_batch, rng)
    size = experiment.train_data.rows_per_batch // experiment.optimizer.accum_steps
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch)
    state = experiment.abstract_state
    trained, frozen = experiment.optimizer.rules.split(state.params)

    def backward(trained: Any, frozen: Any, average: Any, given: Any, batch: Any, rng: Any) -> Any:
        given = {**given, **objective.step_inputs(jnp.zeros((), jnp.int32), average)}

        def loss(params: Any) -> jax.Array:
            return objective.loss({**merge(params, frozen), **given}, batch, rng)[0]

        return jax.vjp(loss, trained)[1]

    model = experiment.model
    keys = ("num_heads", "mlp_dim", "tokens_mlp_dim", "channels_mlp_dim", "num_classes")
    widths = {getattr(model, key, None) for key in keys}
    split = whole = 0.0
    given = (state.ema_params, experiment.abstract_constants)
    for leaf in jax.tree.leaves(jax.eval_shape(backward, trained, frozen, *given, micro, rng)):
        # Arrays without a batch dimension are parameters, which are arguments of the step.
        if size in getattr(leaf, "shape", ()) and hasattr(leaf.dtype, "itemsize"):
            bytes_ = math.prod(leaf.shape) * leaf.dtype.itemsize / size
            if widths & set(leaf.shape):
                split += bytes_
            else:
                whole += bytes_
    return Activations(split, whole)
