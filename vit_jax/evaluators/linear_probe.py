# SPDX-License-Identifier: Apache-2.0
"""Logistic regression on frozen features, with several learning rates and penalties in one run.

Features are whitened, as the batch norm in front of the linear layer does in arXiv:2111.06377,
appendix A.1. The values are compared on a tenth of the training features that is held out, so the
test split chooses nothing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.features import FeatureEvaluator, Features, make_splits, whiten
from vit_jax.losses import softmax_cross_entropy
from vit_jax.objectives.base import Objective
from vit_jax.observe.progress import ProgressLog
from vit_jax.parallel.mesh import BATCH_AXES, batch_sharding
from vit_jax.runtime.preemption import interruptible
from vit_jax.utils.errors import UserError

_MOMENTUM = 0.9
_HELD_OUT = 0.1
# Of the order of examples and of what is held out.
_SEED = 0

_Classifier = dict[str, jax.Array]  # kernel [values, width, classes] and bias [values, classes]


def fit_logistic(
    train: Features,
    *,
    num_classes: int,
    lr: np.ndarray,
    l2: np.ndarray,
    steps: int,
    batch_size: int,
    mesh: Mesh,
    name: str,
) -> _Classifier:
    """Minimises mean cross entropy + l2 / 2 |kernel|^2 by SGD, for all pairs of values at once.

    Momentum is 0.9, the learning rate falls to 0 along a cosine, and the start is 0.

    Args:
      train: whitened features.
      num_classes: labels are below it.
      lr: learning rates `[values]`.
      l2: penalties `[values]`.
      steps: number of updates.
      batch_size: of an update; at most the number of examples is taken.
      mesh: the batch is spread over it.
      name: of the evaluator, for the screen.

    Returns:
      `kernel` `[values, width, num_classes]` and `bias` `[values, num_classes]`.

    Raises:
      Preempted: the job was told to stop.
    """
    width, values = train.features.shape[1], len(lr)
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = {"kernel": (values, width, num_classes), "bias": (values, num_classes)}
    zeros = jax.jit(
        lambda: {k: jnp.zeros(shape) for k, shape in shapes.items()}, out_shardings=everywhere
    )
    update = jax.jit(_update, donate_argnums=(0, 1), out_shardings=everywhere)
    params, momentum = zeros(), zeros()
    batch_size = min(batch_size, len(train.labels))
    pace = ProgressLog(f"{name}: logistic regression", total=steps, unit="steps")
    order = _endless_order(len(train.labels), batch_size)
    for step in interruptible(range(steps)):
        scale = np.float32(0.5 * (1 + np.cos(np.pi * step / steps)))
        batch = _put_rows(train, next(order), mesh)
        params, momentum = update(params, momentum, batch, np.float32(lr) * scale, np.float32(l2))
        if step % 50 == 0:
            jax.block_until_ready(params)  # Else the batches of all steps would wait.
        pace.advance(1)
    return params


def judge_logistic(
    params: _Classifier, test: Features, *, batch_size: int, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Accuracy `top1` and mean cross entropy `loss` on a split, float64 `[values]` each."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    judge = jax.jit(_sum_up, out_shardings=everywhere)
    count = len(test.labels)
    total: dict[str, Any] = {"top1": 0.0, "loss": 0.0}
    for start in range(0, count, batch_size):
        rows = np.arange(start, min(start + batch_size, count))
        sums = jax.device_get(judge(params, _put_rows(test, rows, mesh, size=batch_size)))
        total = {k: total[k] + sums[k].astype(np.float64) for k in total}
    return {k: v / count for k, v in total.items()}


def _apply(params: _Classifier, features: jax.Array) -> jax.Array:
    # Accelerators would round the factors by default.
    products = jnp.matmul(features, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    return products + params["bias"]


def _update(
    params: _Classifier,
    momentum: _Classifier,
    batch: dict[str, jax.Array],
    lr: jax.Array,
    l2: jax.Array,
) -> tuple[_Classifier, _Classifier]:
    def loss(one: _Classifier, l2: jax.Array) -> jax.Array:
        logits = _apply(one, batch["features"])
        losses = softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], logits.shape[-1]))
        mean = jnp.sum(batch["mask"] * losses) / jnp.sum(batch["mask"])
        return mean + l2 / 2 * jnp.sum(one["kernel"] ** 2)

    def move(one: _Classifier, m: _Classifier, lr: jax.Array, l2: jax.Array) -> Any:
        m = jax.tree.map(lambda m, g: _MOMENTUM * m + g, m, jax.grad(loss)(one, l2))
        return jax.tree.map(lambda p, m: p - lr * m, one, m), m

    return jax.vmap(move)(params, momentum, lr, l2)


def _sum_up(params: _Classifier, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def sums(one: _Classifier) -> dict[str, jax.Array]:
        logits = _apply(one, batch["features"])
        losses = softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], logits.shape[-1]))
        hits = jnp.argmax(logits, axis=-1) == batch["label"]
        return {"top1": jnp.sum(batch["mask"] * hits), "loss": jnp.sum(batch["mask"] * losses)}

    return jax.vmap(sums)(params)


def _endless_order(count: int, batch_size: int) -> Iterator[np.ndarray]:
    """Positions of each batch; each epoch is shuffled, and its last, smaller batch left out."""
    rng = np.random.default_rng(_SEED)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _put_rows(
    data: Features, rows: np.ndarray, mesh: Mesh, *, size: int | None = None
) -> dict[str, jax.Array]:
    """Rows on the mesh, filled up with rows of mask 0 to `size` and to what the mesh divides."""
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    size = max(size or 0, len(rows))
    more = size + -size % parts - len(rows)
    batch = {
        "features": np.pad(data.features[rows], ((0, more), (0, 0))),
        "label": np.pad(data.labels[rows], (0, more)),
        "mask": np.pad(np.ones(len(rows), np.float32), (0, more)),
    }
    sharding = batch_sharding(mesh)
    return {
        k: jax.make_array_from_callback(v.shape, sharding, functools.partial(_cut, v))
        for k, v in batch.items()
    }


def _cut(x: np.ndarray, index: Any) -> np.ndarray:
    return x[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(FeatureEvaluator):
    """Test accuracy and loss of the regression whose values are the best on held-out features.

    Attributes:
      lr: learning rates to try, with each of `l2`.
      l2: penalties to try.
      steps: of SGD.
      sgd_batch_size: examples of a step.
    """

    lr: tuple[float, ...]
    l2: tuple[float, ...]
    steps: int
    sgd_batch_size: int

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("top1", "loss")

    def judge(self, train: Features, test: Features) -> tuple[dict[str, float], dict[str, Any]]:
        pairs = list(itertools.product(self.lr, self.l2))
        fit, held_out = train, None
        if len(pairs) > 1:
            fit, held_out = _hold_out(train, name=self.name)
        x, x_test = whiten(fit.features, test.features)
        lr, l2 = np.array(pairs).T
        params = fit_logistic(
            Features(x, fit.labels),
            num_classes=self.data.info.num_classes,
            lr=lr,
            l2=l2,
            steps=self.steps,
            batch_size=self.sgd_batch_size,
            mesh=self.mesh,
            name=self.name,
        )
        judge = functools.partial(judge_logistic, batch_size=self.sgd_batch_size, mesh=self.mesh)
        tried: list[dict[str, float]] = [{"lr": a, "l2": b} for a, b in pairs]
        best = 0
        if held_out is not None:
            (_, x_held) = whiten(fit.features, held_out.features)
            scores = judge(params, Features(x_held, held_out.labels))
            # Of equal accuracies the one of the smaller loss.
            best = int(np.lexsort((scores["loss"], -scores["top1"]))[0])
            for k, v in scores.items():
                for row, value in zip(tried, v, strict=True):
                    row[f"held_out_{k}"] = float(value)
        for k, v in judge(params, Features(x_test, test.labels)).items():
            for row, value in zip(tried, v, strict=True):
                row[k] = float(value)
        return dict(tried[best]), {"tried": tried}


def _hold_out(train: Features, *, name: str) -> tuple[Features, Features]:
    count = len(train.labels)
    if count < 2:
        raise UserError(f"evals.{name}: {count} example to fit to; expected at least 2")
    order = np.random.default_rng(_SEED).permutation(count)
    cut = max(1, round(_HELD_OUT * count))
    held_out, fit = order[:cut], order[cut:]
    return (
        Features(train.features[fit], train.labels[fit]),
        Features(train.features[held_out], train.labels[held_out]),
    )


def make_linear_probe(
    *,
    name: str,
    data: DatasetSpec,
    objective: Objective,
    mesh: Mesh,
    train_split: str,
    every: int = 0,
    lr: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1),
    l2: tuple[float, ...] = (0.0, 1e-4, 1e-2),
    steps: int = 2000,
    sgd_batch_size: int = 1024,
) -> LinearProbe:
    """A `LinearProbe` from config values, checked."""
    if not lr or min(lr) <= 0:
        raise UserError(f"evals.{name}.lr={lr}: expected numbers above 0, such as (0.01, 0.1)")
    if not l2 or min(l2) < 0:
        raise UserError(f"evals.{name}.l2={l2}: expected numbers of at least 0, such as (0.0,)")
    for key, value in (("steps", steps), ("sgd_batch_size", sgd_batch_size)):
        if value < 1:
            raise UserError(f"evals.{name}.{key}={value}: expected at least 1")
    splits = make_splits(data, train_split, every=every, name=name)
    return LinearProbe(
        name=name,
        objective=objective,
        mesh=mesh,
        lr=tuple(lr),
        l2=tuple(l2),
        steps=steps,
        sgd_batch_size=sgd_batch_size,
        **splits,
    )
