# SPDX-License-Identifier: Apache-2.0
"""What the training loop needs to know of an objective."""

from typing import Any, Protocol

import jax

Batch = dict[str, jax.Array]
Params = Any  # a nested dict of arrays


class Objective(Protocol):
    """A model and what is minimised. Knows nothing of meshes, optimizers or checkpoints.

    Attributes:
      own_params: first parts of the paths of parameters that are the objective's and not the
        model's, such as a decoder; they are in the checkpoints of a run, and no other run or file
        takes them over.
      frozen: regular expressions of whole paths that no gradient trains.
      classifies: whether `predict` gives `logits` `[batch, classes]`.
    """

    objective_params: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    classifies: bool = True

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        """Fresh parameters for batches of this shape."""
        ...

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        """Prepares a whole batch on the device, before it is cut into micro-batches."""
        ...

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise over an augmented (micro-)batch, and metrics to average.

        `params` holds `constants` as well.
        """
        ...

    def predict(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Outputs for a batch as it comes from the data: `logits, pre_logits, encoded`."""
        ...

    def constants(self) -> dict[str, Any]:
        """Arrays that `loss` finds in `params` and that are no part of the train state."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """Lines for the screen at the start of a run."""
        return ()

    def lr_multipliers(self) -> tuple[tuple[str, float], ...]:
        """Pairs of an expression for whole paths and a factor on their learning rate."""
        return ()

    def track(
        self, params: Params, metrics: dict[str, jax.Array]
    ) -> tuple[Params, dict[str, jax.Array]]:
        """Moves running statistics among the parameters; takes what it needs out of `metrics`."""
        return params, metrics
