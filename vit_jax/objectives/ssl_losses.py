# SPDX-License-Identifier: Apache-2.0
"""Losses of self-distillation, and the targets that a teacher gives for them.

All sums are over whole arrays, so under `jit` they are over the global batch, on any mesh. Scores
are the outputs of a head, one for each prototype. Everything is computed in float32.
"""

import jax
import jax.numpy as jnp

from vit_jax.losses import softmax_cross_entropy

# Added by the published KoLeo loss: to norms, to differences and to distances.
_KOLEO_EPSILON = 1e-8


def sinkhorn_targets(
    scores: jax.Array,
    temperature: jax.Array | float,
    *,
    iterations: int = 3,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Returns distributions over prototypes that use all prototypes equally.

    exp(scores / temperature) is scaled in turns: each prototype to a total of 1 / prototypes over
    the batch, then each row to 1 / rows. It is computed with logarithms of the scales, so that no
    temperature overflows. Source: arXiv:2006.09882, section 3.1 and appendix, as in DINOv2.

    Args:
      scores: float `[..., prototypes]`; all leading dimensions together are the batch.
      temperature: divides the scores.
      iterations: number of turns; with 0, the whole matrix is divided by its mean over rows.
      valid: bool `[...]`, rows that count; None for all.

    Returns:
      float32, of the shape of `scores`; rows that do not count are 0.
    """
    shape, prototypes = scores.shape, scores.shape[-1]
    logits = scores.astype(jnp.float32).reshape(-1, prototypes) / temperature
    mask = jnp.ones(len(logits), bool) if valid is None else valid.reshape(-1)
    rows = mask.sum(dtype=jnp.float32)
    row_scale = jnp.where(mask, 0.0, -jnp.inf)[:, None]
    prototype_scale = -jax.nn.logsumexp(logits + row_scale)
    for _ in range(iterations):
        prototype_scale = -jnp.log(prototypes) - jax.nn.logsumexp(
            logits + row_scale, axis=0, keepdims=True
        )
        totals = jax.nn.logsumexp(logits + prototype_scale, axis=1, keepdims=True)
        row_scale = jnp.where(mask[:, None], -jnp.log(rows) - totals, -jnp.inf)
    targets = rows * jnp.exp(logits + prototype_scale + row_scale)
    return targets.reshape(shape)


def centered_targets(
    scores: jax.Array, center: jax.Array, temperature: jax.Array | float
) -> jax.Array:
    """Returns softmax((scores - center) / temperature), float32 `[..., prototypes]`.

    `scores` are float `[..., prototypes]` and `center`, their running mean, `[prototypes]`. Source:
    arXiv:2104.14294, equation 4.
    """
    return jax.nn.softmax((scores.astype(jnp.float32) - center) / temperature)


def crop_losses(
    targets: jax.Array, global_scores: jax.Array, local_scores: jax.Array | None, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross entropies between each crop and the other global crops.

    Each of the 2 + 2 L pairs of a target and a student's crop weighs the same; a crop is not
    compared with its own target. Sources: arXiv:2104.14294, equation 3; weights as in DINOv2.

    Args:
      targets: distributions for the global crops, float32 `[batch, 2, prototypes]`.
      global_scores: of the student for the same crops, float `[batch, 2, prototypes]`.
      local_scores: of the student, float `[batch, L, prototypes]`; None for no local crops.
      temperature: of the student.

    Returns:
      Float32 scalars: the part of the global crops, and that of the local crops.
    """
    locals_ = 0 if local_scores is None else local_scores.shape[1]
    pairs = 2 + 2 * locals_
    logits = global_scores.astype(jnp.float32) / temperature
    across = softmax_cross_entropy(logits, targets[:, ::-1]).mean(axis=0).sum() / pairs
    if local_scores is None:
        return across, jnp.zeros(())
    logits = local_scores.astype(jnp.float32) / temperature
    # A cross entropy is linear in its target: both targets of an image in one.
    both = targets.sum(axis=1, keepdims=True)
    return across, softmax_cross_entropy(logits, both).mean(axis=0).sum() / pairs


def patch_loss(
    targets: jax.Array, scores: jax.Array, weights: jax.Array, temperature: float, *, images: int
) -> jax.Array:
    """Returns the cross entropy of masked patches, a float32 scalar (arXiv:2111.07832, equation 2).

    Args:
      targets: distributions for the patches, float32 `[..., prototypes]`.
      scores: of the student, float `[..., prototypes]`.
      weights: float32 `[...]`: 1 / (masked patches of the image), or 0 to leave one out.
      temperature: of the student.
      images: what the sum is divided by: the number of images, with and without a mask.
    """
    losses = softmax_cross_entropy(scores.astype(jnp.float32) / temperature, targets)
    return (losses * weights).sum() / images


def koleo_loss(features: jax.Array) -> jax.Array:
    """Returns -mean log of the distance to the nearest other row, a float32 scalar.

    Rows of `features`, float `[batch, width]`, are normalised first. Spreads features over the
    sphere (arXiv:1806.03198, equation 4). A batch of one has no neighbour: the result is infinite.
    """
    x = features.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), _KOLEO_EPSILON)
    products = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    products = jax.lax.stop_gradient(jnp.where(jnp.eye(len(x), dtype=bool), -1.0, products))
    nearest = jnp.argmax(products, axis=1)
    distance = jnp.linalg.norm(x - x[nearest] + _KOLEO_EPSILON, axis=1)
    return -jnp.log(distance + _KOLEO_EPSILON).mean()


def gram_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns the mean squared difference of cosines among patches, a float32 scalar.

    Both are features of the patches of the same images, float `[batch, patches, width]`; only the
    student's receive a gradient. Source: arXiv:2508.10104, section 4.2.
    """

    def cosines(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return jnp.einsum("bpd,bqd->bpq", x, x)

    return jnp.square(cosines(student) - jax.lax.stop_gradient(cosines(teacher))).mean()
