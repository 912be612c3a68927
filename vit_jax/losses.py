# SPDX-License-Identifier: Apache-2.0
"""Losses and hits, one value for each example.

The logit of a label is selected by a product with one-hot targets, not by indexing: if logits are
sharded by classes, the sums become small all-reduces and no device gathers all classes.
"""

import jax
import jax.numpy as jnp

ClassWeights = tuple[float, ...] | None


def softmax_cross_entropy(
    logits: jax.Array, targets: jax.Array, class_weights: ClassWeights = None
) -> jax.Array:
    """Returns the cross entropy of each example, float32 `[batch]`: -sum_c w_c t_c log p_c.

    Args:
      logits: float32 `[batch, classes]`.
      targets: distributions over classes t, float32 `[batch, classes]`.
      class_weights: one factor w for each class; None for 1.
    """
    if class_weights is not None:
        targets = targets * jnp.asarray(class_weights, jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) * targets.sum(-1) - (targets * logits).sum(-1)


def sigmoid_cross_entropy(
    logits: jax.Array, targets: jax.Array, class_weights: ClassWeights = None
) -> jax.Array:
    """Returns the sum over classes of binary cross entropies, float32 `[batch]` (arXiv:2006.07159).

    `logits`, `targets` in [0, 1] and `class_weights` are as in `softmax_cross_entropy`.
    """
    terms = targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)
    if class_weights is not None:
        terms = terms * jnp.asarray(class_weights, jnp.float32)
    return -terms.sum(axis=-1)


def distillation_divergence(
    logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
    """Returns t^2 KL(teacher || student) of each example, float32 `[batch]`.

    Both logits, float32 `[batch, classes]`, are divided by the temperature t (arXiv:1503.02531).
    """
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(axis=-1)


def top1_hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns which examples are classified correctly, float32 `[..., batch]` of 0 to 1.

    Classes that share the highest logit share the hit, so that a new head of zeros has the accuracy
    of a guess. Maxima are counted, not sorted, so that logits stay sharded by classes.

    Args:
      logits: `[..., batch, classes]`.
      labels: int32 `[batch]`.
    """
    highest = logits == logits.max(axis=-1, keepdims=True)
    own = highest & (jnp.arange(logits.shape[-1]) == labels[:, None])
    return own.any(axis=-1) / jnp.maximum(highest.sum(axis=-1), 1)


def make_targets(labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns targets `[batch, num_classes]`: one-hot float32, or the padded labels in their dtype.

    Args:
      labels: classes, int32 `[batch]`; or `[batch, classes]` of zeros and ones, in any dtype.
      num_classes: at least the number of classes of the labels.
    """
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes)
    return jnp.pad(labels, ((0, 0), (0, num_classes - labels.shape[-1])))


def smooth_labels(targets: jax.Array, smoothing: float) -> jax.Array:
    """Moves `smoothing`, in [0, 1), of each target's mass to the uniform distribution.

    Targets are float32 `[batch, classes]`, and so is the result. Source: arXiv:1512.00567.
    """
    if not smoothing:
        return targets
    return targets * (1 - smoothing) + jnp.float32(smoothing) / targets.shape[-1]


LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}
