# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a model, counted in its traced program.

Only matrix products and convolutions count, as in the literature. The body of a scan counts once
for each iteration; XLA's own cost analysis counts it once.
"""

import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from vit_jax.models.interface import example_inputs, unsharded


def forward_flops(model: nn.Module, image_size: tuple[int, ...]) -> int:
    """Returns the operations of the forward pass of one image in training, and of its text if any.

    A multiply-add is two operations; `image_size` is (height, width) in pixels. The products of
    all images with all texts of a batch are not counted.
    """
    model = unsharded(model)  # The mesh of a run may not divide a batch of one image.
    inputs = example_inputs(model, (*image_size, 3))
    rng = jax.random.key(0)
    params = jax.eval_shape(lambda: model.init(rng, *inputs, train=False))
    # Both towers' embeddings are results, so none of them is left out of the program.
    traced = jax.make_jaxpr(
        lambda p: model.apply(p, *inputs, train=True, rngs={"dropout": rng})[:-1]
    )
    return count_flops(traced(params))


def train_flops(model: nn.Module, image_size: tuple[int, ...]) -> int:
    """Returns the operations of one image in a training step: three forward passes.

    Model FLOPs utilisation (MFU) is based on this number, so recomputation to save memory does not
    count. Source: arXiv:2204.02311, appendix B.
    """
    return 3 * forward_flops(model, image_size)


def count_flops(program: ClosedJaxpr | Jaxpr) -> int:
    """Returns the operations of a traced program's matrix products and convolutions.

    They are summed over all devices. The most expensive branch of a conditional counts, and the
    cheapest of those for different platforms, since they compute the same; the body of a loop of
    unknown length counts once.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            depth = math.prod(_shape(eqn.invars[0])[d] for d in contracted)
            total += 2 * math.prod(_shape(eqn.outvars[0])) * depth
        elif name.startswith("dot_product_attention_"):  # the kernels of `fused` attention
            total += _attention_flops(eqn)
        elif name == "pallas_call":  # `pallas` attention
            total += eqn.params["cost_estimate"].flops
            continue
        elif name == "conv_general_dilated":
            total += _conv_flops(eqn)
        inner = [count_flops(sub) for sub in _sub_programs(eqn.params)]
        if name == "cond":
            choose = min if eqn.params.get("branches_platforms") else max
            total += choose(inner, default=0)
        else:
            total += sum(inner) * _count_runs(eqn)
    return total


def _count_runs(eqn: Any) -> int:
    """How often an operation runs the programs within it, on all devices."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    return eqn.params["mesh"].size if eqn.primitive.name == "shard_map" else 1


def _conv_flops(eqn: Any) -> int:
    kernel = _shape(eqn.invars[1])
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    depth = math.prod(kernel) // out_features
    # Zeros between the inputs, as in the gradient of a strided convolution, do not count.
    zeros = math.prod(eqn.params["lhs_dilation"])
    return 2 * math.prod(_shape(eqn.outvars[0])) * depth // zeros


def _attention_flops(eqn: Any) -> int:
    batch, queries, heads, head_dim = _shape(eqn.invars[0])
    product = 2 * batch * heads * queries * _shape(eqn.invars[1])[1] * head_dim
    # Scores and outputs; backward, the scores again and the gradients of q, k, v and scores.
    return product * (5 if eqn.primitive.name.startswith("dot_product_attention_bwd") else 2)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _sub_programs(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item
