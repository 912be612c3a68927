# SPDX-License-Identifier: Apache-2.0
"""What the training loop needs to know of an objective."""

from typing import Any, Protocol

import jax

Batch = dict[str, jax.Array]
Params = Any  # a nested dict of arrays


class Objective(Protocol):
    """A model and what is minimised. Knows nothing of meshes, optimizers or checkpoints."""

    def init(self, rng: jax.Array, batch: Batch) -> Params:
        """Fresh parameters for batches of this shape."""
        ...

    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        """Prepares a whole batch on the device, before it is cut into micro-batches."""
        ...

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar to minimise over an augmented (micro-)batch, and metrics to average."""
        ...

    def predict(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Outputs for a batch as it comes from the data: `logits, pre_logits, encoded`."""
        ...
