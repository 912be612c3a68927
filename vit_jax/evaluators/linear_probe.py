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

from vit_jax.evaluators.features import FeatureEvaluator, Features, shard_rows, whiten
from vit_jax.losses import softmax_cross_entropy
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.runtime.preemption import interruptible
from vit_jax.utils.errors import UserError

_MOMENTUM = 0.9
_HELD_OUT = 0.1
# Seed of the order of examples and of the choice of those that are held out.
_SEED = 0

# `kernel` float32 [values, width, classes] and `bias` float32 [values, classes].
_Classifier = dict[str, jax.Array]


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

    Momentum is 0.9, the learning rate falls to 0 along a cosine, and all parameters start at 0.

    Args:
      train: whitened features.
      num_classes: labels are below it.
      lr: learning rates, float `[values]`.
      l2: penalties, float `[values]`.
      steps: number of updates.
      batch_size: examples of an update; at most all of them.
      mesh: the batch is sharded over it.
      name: name of the evaluator, for the log.

    Raises:
      Preempted: the job was asked to stop.
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
    order = _endless_order(len(train.labels), batch_size)
    rates, decays = np.float32(lr), np.float32(l2)
    with ProgressLog(f"{name}: logistic regression", total=steps, unit="steps") as progress:
        for step in interruptible(range(steps)):
            scale = np.float32(0.5 * (1 + np.cos(np.pi * step / steps)))
            batch = _make_batch(train, next(order), mesh)
            params, momentum = update(params, momentum, batch, rates * scale, decays)
            if step % 50 == 0:
                jax.block_until_ready(params)  # So that few batches are on the device at a time.
            progress.advance(1)
    return params


def judge_logistic(
    params: _Classifier, test: Features, *, batch_size: int, mesh: Mesh
) -> dict[str, np.ndarray]:
    """The accuracy `top1` and the mean `loss` on whitened features, float64 `[values]` each."""
    judge = jax.jit(_sum_up, out_shardings=NamedSharding(mesh, PartitionSpec()))
    count = len(test.labels)
    total: dict[str, Any] = {"top1": 0.0, "loss": 0.0}
    for start in range(0, count, batch_size):
        rows = np.arange(start, min(start + batch_size, count))
        sums = jax.device_get(judge(params, _make_batch(test, rows, mesh, size=batch_size)))
        total = {k: total[k] + sums[k].astype(np.float64) for k in total}
    return {k: v / count for k, v in total.items()}


def _apply(one: _Classifier, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The logits `[batch, classes]` and the cross entropies `[batch]` of one classifier."""
    # Accelerators would round the factors by default.
    products = jnp.matmul(batch["features"], one["kernel"], precision=jax.lax.Precision.HIGHEST)
    logits = products + one["bias"]
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    return logits, softmax_cross_entropy(logits, targets)


def _update(
    params: _Classifier,
    momentum: _Classifier,
    batch: dict[str, jax.Array],
    lr: jax.Array,
    l2: jax.Array,
) -> tuple[_Classifier, _Classifier]:
    def loss(one: _Classifier, l2: jax.Array) -> jax.Array:
        _, losses = _apply(one, batch)
        mean = jnp.sum(batch["mask"] * losses) / jnp.sum(batch["mask"])
        return mean + l2 / 2 * jnp.sum(one["kernel"] ** 2)

    def move(one: _Classifier, m: _Classifier, lr: jax.Array, l2: jax.Array) -> Any:
        m = jax.tree.map(lambda m, g: _MOMENTUM * m + g, m, jax.grad(loss)(one, l2))
        return jax.tree.map(lambda p, m: p - lr * m, one, m), m

    return jax.vmap(move)(params, momentum, lr, l2)


def _sum_up(params: _Classifier, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def sums(one: _Classifier) -> dict[str, jax.Array]:
        logits, losses = _apply(one, batch)
        hits = jnp.argmax(logits, axis=-1) == batch["label"]
        return {"top1": jnp.sum(batch["mask"] * hits), "loss": jnp.sum(batch["mask"] * losses)}

    return jax.vmap(sums)(params)


def _endless_order(count: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields the positions of each batch; epochs are shuffled, and drop a last, smaller batch."""
    rng = np.random.default_rng(_SEED)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _make_batch(
    data: Features, rows: np.ndarray, mesh: Mesh, *, size: int = 0
) -> dict[str, jax.Array]:
    """Some examples on the mesh; those added by `shard_rows` have the mask 0."""
    batch = {
        "features": data.features[rows],
        "label": data.labels[rows],
        "mask": np.ones(len(rows), np.float32),
    }
    return {k: shard_rows(v, mesh, size=size) for k, v in batch.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(FeatureEvaluator):
    """Test accuracy and loss of the regression whose values are the best on held-out features.

    Attributes:
      lr: learning rates to try, with each of `l2`.
      l2: penalties to try.
      steps: number of steps of SGD.
      sgd_batch_size: examples of a step.
    """

    lr: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    l2: tuple[float, ...] = (0.0, 1e-4, 1e-2)
    steps: int = 2000
    sgd_batch_size: int = 1024

    def __post_init__(self) -> None:
        self.check(min(self.lr, default=0) > 0, "lr", "numbers above 0, such as (0.01, 0.1)")
        self.check(min(self.l2, default=-1) >= 0, "l2", "numbers of at least 0, such as (0.0,)")
        self.check(self.steps >= 1, "steps", "at least 1")
        self.check(self.sgd_batch_size >= 1, "sgd_batch_size", "at least 1")
        super().__post_init__()

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
        columns, best = {}, 0
        if held_out is not None:
            _, x_held = whiten(fit.features, held_out.features)
            scores = judge(params, Features(x_held, held_out.labels))
            # Of equal accuracies, the one with the smaller loss is the best.
            best = int(np.lexsort((scores["loss"], -scores["top1"]))[0])
            columns = {f"held_out_{k}": v for k, v in scores.items()}
        columns |= judge(params, Features(x_test, test.labels))
        tried: list[dict[str, float]] = [
            {"lr": a, "l2": b} | {k: float(v[i]) for k, v in columns.items()}
            for i, (a, b) in enumerate(pairs)
        ]
        return dict(tried[best]), {"tried": tried}


def _hold_out(train: Features, *, name: str) -> tuple[Features, Features]:
    count = len(train.labels)
    if count < 2:
        raise UserError(f"evals.{name}: {count} example to fit to; expected at least 2")
    order = np.random.default_rng(_SEED).permutation(count)
    held_out, fit = np.split(order, [max(1, round(_HELD_OUT * count))])
    fit, held_out = (Features(train.features[rows], train.labels[rows]) for rows in (fit, held_out))
    return fit, held_out
