# SPDX-License-Identifier: Apache-2.0
"""Losses of pairs of an image and a text, each compared with all others of the global batch.

All take unit vectors, one for each image and for the text of the same row, in float32, and compute
products of them at the highest precision: at a scale of 100, factors rounded to bfloat16 change a
logit by up to 0.4.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from vit_jax.parallel.mesh import BATCH_AXES, count_batch_shards
from vit_jax.parallel.sharding import constrain

Metrics = dict[str, jax.Array]


def softmax_loss(
    zimg: jax.Array, ztxt: jax.Array, t: jax.Array, *, mesh: Mesh | None = None
) -> tuple[jax.Array, Metrics]:
    """The mean of two cross entropies: of the text of each image, and of the image of each text.

    Args:
      zimg: unit vectors of images, float32 `[batch, width]`.
      ztxt: unit vectors of their texts, float32 `[batch, width]`.
      t: the logarithm of the factor on similarities, float32 scalar.
      mesh: similarities are sharded by rows over it; None for no sharding.

    Returns:
      The loss, a float32 scalar, and the accuracies of `top1_within_batch`.

    Source: arXiv:2103.00020 (CLIP), figure 3.
    """
    similarities = _compare(zimg, ztxt, mesh)
    logits = jnp.exp(t) * similarities
    own = _diagonal(logits)
    rows = jax.nn.logsumexp(logits, axis=1) - own
    columns = jax.nn.logsumexp(logits, axis=0) - own
    return (rows.mean() + columns.mean()) / 2, top1_within_batch(similarities)


def sigmoid_loss(
    zimg: jax.Array, ztxt: jax.Array, t: jax.Array, b: jax.Array, *, mesh: Mesh | None = None
) -> tuple[jax.Array, Metrics]:
    """The mean over images of the sum over texts of binary cross entropies: is it the image's text?

    Each device holds the logits of its images with all texts, which are gathered.

    Args:
      zimg: unit vectors of images, float32 `[batch, width]`.
      ztxt: unit vectors of their texts, float32 `[batch, width]`.
      t: the logarithm of the factor on similarities, float32 scalar.
      b: is added to logits, float32 scalar.
      mesh: similarities are sharded by rows over it; None for no sharding.

    Returns:
      The loss, a float32 scalar, and the accuracies of `top1_within_batch`.

    Source: arXiv:2303.15343 (SigLIP), equation 1 and algorithm 1.
    """
    similarities = _compare(zimg, ztxt, mesh)
    logits = jnp.exp(t) * similarities + b
    losses = jax.nn.softplus(jnp.where(_eye(len(logits)), -logits, logits))
    return losses.sum() / len(logits), top1_within_batch(similarities)


def ring_sigmoid_loss(
    zimg: jax.Array, ztxt: jax.Array, t: jax.Array, b: jax.Array, *, mesh: Mesh
) -> tuple[jax.Array, Metrics]:
    """The value and the gradients of `sigmoid_loss`, with the memory of a block of logits a device.

    The texts pass around a ring of devices, which compare them with their own images one block
    after the other. A block is only computed once: the gradients of the texts travel with them.

    Arguments and results are those of `sigmoid_loss`, and the number of parts that the mesh cuts a
    batch into divides the batch. Source: arXiv:2303.15343, section 3.3.
    """
    outputs: Any = _ring_loss(mesh, zimg, ztxt, t, b)
    loss, image_hits, text_hits = outputs
    return loss, _name_hits(image_hits, text_hits)


def top1_within_batch(similarities: jax.Array) -> Metrics:
    """The shares of images whose own text is the most similar one, and of texts, of their images.

    Takes similarities `[images, texts]`. Pairs of equal similarity share the hit, so that equal
    vectors have the accuracy of a guess. No gradient reaches the similarities.
    """
    similarities = jax.lax.stop_gradient(similarities)
    own = _diagonal(similarities)
    hits = [
        _count_hits(*(x.sum(axis=axis) for x in _compete(similarities, reference))).mean()
        for axis, reference in ((1, own[:, None]), (0, own[None]))
    ]
    return _name_hits(*hits)


def _name_hits(image_hits: jax.Array, text_hits: jax.Array) -> Metrics:
    return {"image_to_text_top1": image_hits, "text_to_image_top1": text_hits}


def _compete(similarities: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which pairs are more similar than the own ones, and which are as similar; int32."""
    return (similarities > own).astype(jnp.int32), (similarities == own).astype(jnp.int32)


def _count_hits(ahead: jax.Array, equal: jax.Array) -> jax.Array:
    """Hits, 0 to 1, from the numbers of pairs ahead of the own and as similar, itself included."""
    return jnp.where(ahead > 0, 0.0, 1.0 / equal)


def _compare(zimg: jax.Array, ztxt: jax.Array, mesh: Mesh | None) -> jax.Array:
    similarities = _product(zimg, ztxt.T)
    if mesh is None:
        return similarities
    # What is sharded over classes in other models are texts here.
    return constrain(similarities, ("batch", "classes"), mesh=mesh)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _eye(size: int) -> jax.Array:
    return jnp.arange(size)[:, None] == jnp.arange(size)


def _diagonal(x: jax.Array) -> jax.Array:
    # A sum, as a sharded matrix has no diagonal that can be read locally.
    return jnp.where(_eye(len(x)), x, 0).sum(axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_loss(mesh: Mesh, zimg: jax.Array, ztxt: jax.Array, t: jax.Array, b: jax.Array) -> Any:
    return _ring_loss_forward(mesh, zimg, ztxt, t, b)[0]


def _ring_loss_forward(mesh: Mesh, *args: jax.Array) -> tuple[Any, Any]:
    shards = count_batch_shards(mesh)
    rows, scalar = PartitionSpec(BATCH_AXES), PartitionSpec()
    run = jax.shard_map(
        functools.partial(_run_ring, shards=shards, batch=len(args[0])),
        mesh=mesh,
        in_specs=(rows, rows, scalar, scalar),
        out_specs=((scalar, scalar, scalar), (rows, rows, scalar, scalar)),
        # Sums over the batch axes are equal on all devices, which is not derived through the scan.
        check_vma=False,
    )
    return run(*args)


def _ring_loss_backward(mesh: Mesh, gradients: Any, cotangents: Any) -> Any:
    return tuple(cotangents[0] * x for x in gradients)


_ring_loss.defvjp(_ring_loss_forward, _ring_loss_backward)


def _run_ring(
    zimg: jax.Array, ztxt: jax.Array, t: jax.Array, b: jax.Array, *, shards: int, batch: int
) -> tuple[Any, Any]:
    """What one device of the ring computes, see `ring_sigmoid_loss`.

    Returns the loss with the accuracies of images and texts, and the gradients of the loss.
    """
    size, scale = len(zimg), jnp.exp(t)

    def compare(text: Any, image: Any, *, own: bool) -> tuple[Any, Any]:
        """Adds the pairs of one block of texts to what is known of them and of the images."""
        similarities = _product(zimg, text["z"].T)
        logits = scale * similarities + b
        labels = _eye(size) if own else jnp.zeros((), bool)
        grad = (jax.nn.sigmoid(logits) - labels) / batch
        if own:
            diagonal = _diagonal(similarities)
            text, image = text | {"own": diagonal}, image | {"own": diagonal}
        by_image = _compete(similarities, image["own"][:, None])
        by_text = _compete(similarities, text["own"][None])
        image = image | {
            "loss": image["loss"] + jax.nn.softplus(jnp.where(labels, -logits, logits)).sum(),
            "grad": image["grad"] + scale * _product(grad, text["z"]),
            "grad_t": image["grad_t"] + (grad * (logits - b)).sum(),
            "grad_b": image["grad_b"] + grad.sum(),
            "ahead": image["ahead"] + by_image[0].sum(axis=1),
            "equal": image["equal"] + by_image[1].sum(axis=1),
        }
        text = text | {
            "grad": text["grad"] + scale * _product(grad.T, zimg),
            "ahead": text["ahead"] + by_text[0].sum(axis=0),
            "equal": text["equal"] + by_text[1].sum(axis=0),
        }
        return text, image

    def hop(carry: Any, _: None) -> tuple[Any, None]:
        text, image = carry
        return compare(pass_on(text), image, own=False), None

    def pass_on(text: Any) -> Any:
        ring = [(i, (i + 1) % shards) for i in range(shards)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, BATCH_AXES, ring), text)

    zero, count = jnp.zeros((), jnp.float32), jnp.zeros(size, jnp.int32)
    text = {"z": ztxt, "grad": jnp.zeros_like(ztxt), "ahead": count, "equal": count}
    image = {"grad": jnp.zeros_like(zimg), "ahead": count, "equal": count}
    image |= {"loss": zero, "grad_t": zero, "grad_b": zero}
    carry = compare(text, image, own=True)
    if shards > 1:
        carry, _ = jax.lax.scan(hop, carry, length=shards - 1)
    text, image = carry
    del text["z"]
    text = pass_on(text)  # The last of as many hops as there are devices: the texts are back.
    hits = [_count_hits(x["ahead"], x["equal"]).sum() for x in (image, text)]
    sums = jax.lax.psum((image["loss"], *hits, image["grad_t"], image["grad_b"]), BATCH_AXES)
    loss, image_hits, text_hits, grad_t, grad_b = sums
    outputs = (loss / batch, image_hits / batch, text_hits / batch)
    return outputs, (image["grad"], text["grad"], grad_t, grad_b)
