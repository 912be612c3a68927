# SPDX-License-Identifier: Apache-2.0
"""The base class of objectives: a model and the loss that it is trained with."""

import abc
import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import jax

from vit_jax.utils.errors import UserError

Batch = dict[str, jax.Array]
Params = Any  # a nested dict of arrays


@dataclasses.dataclass(frozen=True)
class CachedFeatures:
    """Features of images that a frozen part of the model gives, in place of the images.

    Attributes:
      folder: of the files that hold them.
      name: of the features, in what `predict` returns and in batches: float32 `[batch, width]`.
      width: of the features.
      part: first part of the paths of the parameters that make them, all of which are frozen.
    """

    folder: str
    name: str
    width: int
    part: str


Make = TypeVar("Make", bound=Callable)


def headless(make: Make) -> Make:
    """Marks a constructor of objectives that train a model without its head (`num_classes=0`)."""
    make.headless = True  # pyright: ignore[reportFunctionMemberAccess]
    return make


def check_share(**shares: float) -> None:
    """Raises `UserError` unless the values of these keys of the config are 0 to 1."""
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"objective.{key}={value}: expected 0 to 1")


class Objective(abc.ABC):
    """A model and what is minimised. Knows nothing of optimizers or checkpoints.

    Batches from the data have `image` uint8 `[batch, height, width, channels]` and `label` int32
    `[batch]`, or float32 `[batch, classes]` of zeros and ones where examples have several labels;
    or `label_map` uint8 `[batch, height, width]` where pixels have classes, with 255 for none.

    Attributes:
      objective_params: first parts of the paths of parameters that belong to the objective and not
        to the model, such as a decoder; a run saves them in its checkpoints, and only runs with the
        same objective load them.
      frozen: regular expressions of whole paths of parameters that no gradient trains.
      classifies: whether `predict` returns `logits` `[batch, classes]`.
      keeps_average: whether the train state has an average of the parameters by `average_decay`.
      needs_labels: whether batches must have `label`.
      needs_label_maps: whether they must have `label_map`.
      draws_patch_size: whether each step may have a patch of another size (`model.patch_sizes`).
      takes_any_size: whether its model may be given patches of images of any size (see `pixels`).
      cached_features: what batches have in place of `image`; None for images.
      takes_rows: whether several of these may share a row of a batch (see `data.rows`).
      head_names: names of the heads of `head_logits` `[heads, batch, classes]`, if `predict`
        returns those.
    """

    objective_params: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    classifies: bool = True
    keeps_average: bool = False
    needs_labels: bool = True
    needs_label_maps: bool = False
    draws_patch_size: bool = False
    takes_any_size: bool = False
    takes_rows: bool = False

    @property
    def cached_features(self) -> CachedFeatures | None:
        return None

    @property
    def head_names(self) -> tuple[str, ...]:
        return ()

    @abc.abstractmethod
    def init(self, rng: jax.Array, batch: Batch) -> Params:
        """Initialises parameters for batches of this shape from a key."""

    @abc.abstractmethod
    def augment(self, batch: Batch, rng: jax.Array) -> Batch:
        """Prepares a whole batch for `loss` on the device, before it is split into micro-batches.

        The result has at least `image`, float32 `[batch, height, width, channels]`.
        """

    @abc.abstractmethod
    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss of an augmented (micro-)batch; `params` include the `constants`.

        Returns the float32 scalar to minimise, and metrics that are averaged over micro-batches,
        float32 scalars such as `loss` and what `update_statistics` needs.
        """

    @abc.abstractmethod
    def predict(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Returns the outputs of the model for a batch from the data.

        These are `pre_logits` `[batch, width]`, `encoded` `[batch, tokens, width]` and, see
        `classifies` and `head_names`, `logits` or `head_logits`, in the dtype of the model.
        """

    def at_step(self, *, seed: int, step: int) -> "Objective":
        """The objective that update number `step`, from 1, minimises: itself, or a variant of it.

        The variants are hashable, and few, since a step is compiled for each.
        """
        del seed, step
        return self

    def with_model(self, model: Any) -> Self:
        """The same objective with another Flax module, which has the same parameters."""
        # A copy keeps what was loaded, such as a teacher.
        other = copy.copy(self)
        object.__setattr__(other, "model", model)
        return other

    def constants(self) -> dict[str, Any]:
        """Arrays that `loss` finds in `params` and that are not part of the train state."""
        return {}

    def load_params(self) -> Params:
        """Returns parts of the initial parameters that are read from files, on the host.

        They are read before the first step alone, since checkpoints hold them. Raises `UserError`
        where a file can't be read or does not fit.
        """
        return {}

    def step_inputs(self, step: jax.Array, average: Params) -> dict[str, Any]:
        """More arrays that `loss` finds in `params`, which no gradient reaches.

        Args:
          step: number of updates made before, an int32 scalar.
          average: the average of the parameters, if the objective keeps one; else None.
        """
        return {}

    def average_decay(self, step: jax.Array) -> jax.Array | float:
        """Decay of the average in the update after `step` others, a float32 scalar."""
        raise NotImplementedError

    def follow_average(
        self, params: Params, average: Params, before: jax.Array, step: jax.Array | int
    ) -> tuple[Params, Params]:
        """Copies parts of the average into frozen parameters; returns parameters and average.

        It comes after every update, also one that `on_divergence` has left out, and when a run
        resumes, which may leave out several.

        Args:
          params: of the train state.
          average: of the train state.
          before: number of updates at the last call, an int32 scalar.
          step: number of updates now.
        """
        return params, average

    def check_batch(self, size: int) -> None:
        """Raises `UserError` if `loss` is not defined for (micro-)batches of so many examples."""
        return

    def notes(self) -> tuple[str, ...]:
        """Lines that are logged at the start of a run."""
        return ()

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Lines on metrics of a record that show a fault of the run, by a name for the fault.

        Each fault is logged once in a run.
        """
        return {}

    def lr_multipliers(self) -> tuple[tuple[str, float], ...]:
        """Pairs of a regular expression for whole paths and a factor on their learning rate."""
        return ()

    def update_statistics(
        self, params: Params, metrics: dict[str, jax.Array]
    ) -> tuple[Params, dict[str, jax.Array]]:
        """Updates running statistics among the parameters with the metrics of a step.

        It comes after the update, and may bound parameters too. Returns the parameters, and the
        metrics without those that it needs alone.
        """
        return params, metrics


class CoupledObjective(Objective):
    """An objective whose loss compares the examples of a batch with one another.

    Losses of micro-batches would be of fewer comparisons, so the step encodes a batch in
    micro-batches and takes one loss of all; see `training.step.couple_gradients`.
    """

    @abc.abstractmethod
    def encode(self, params: Params, batch: Batch, rng: jax.Array) -> Any:
        """Encodes an augmented (micro-)batch: a pytree of arrays `[batch, ...]`, row by row."""

    @abc.abstractmethod
    def combine(self, params: Params, encoded: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes what `loss` returns from what `encode` gives for the whole batch."""

    def loss(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.combine(params, self.encode(params, batch, rng))
