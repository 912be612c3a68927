# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, without clipping, weight decay, learning rate and schedule.

The keyword arguments of each are its keys in a config. State that belongs to a parameter carries
its path at the end of its own, by which it is sharded.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from vit_jax.optim.rules import is_stacked
from vit_jax.utils.errors import UserError
from vit_jax.utils.tree import flatten, path_str

Dtype = Literal["float32", "bfloat16"]
# Says of each of some parameters whether weight decay shrinks it.
DecayMask = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Direction:
    """What makes a direction of gradients.

    Attributes:
      tx: before weight decay is added.
      after_decay: makes, of the mask of what decays, what is done once it has been.
      averaging: of schedule-free optimizers, the share of the average in the point that gradients
        are taken at (beta in arXiv:2405.15682); None for the others.
    """

    tx: optax.GradientTransformation
    after_decay: Callable[[DecayMask], optax.GradientTransformation] | None = None
    averaging: float | None = None


def sgd(
    *, momentum: float = 0.9, nesterov: bool = False, momentum_dtype: Dtype = "float32"
) -> Direction:
    """Heavy-ball momentum."""
    _check_rates(momentum=momentum)
    return Direction(
        optax.trace(decay=momentum, nesterov=nesterov, accumulator_dtype=momentum_dtype)
    )


def adamw(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: Dtype = "float32"
) -> Direction:
    """Adam's direction; with `weight_decay` it is AdamW (arXiv:1711.05101)."""
    _check_rates(b1=b1, b2=b2)
    return Direction(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype))


def adafactor(
    *,
    momentum: float | None = 0.9,
    momentum_dtype: Dtype = "bfloat16",
    decay_rate: float = 0.8,
    b2_cap: float = 0.999,
    clipping_threshold: float | None = None,
    min_dim_size_to_factor: int = 32,
    eps: float = 1e-30,
) -> Direction:
    """Adafactor (arXiv:1804.04235) as changed for ViTs (arXiv:2106.04560, section 3.3).

    The second moment of the two largest dimensions is kept as the means over each of them, decays
    by min(1 - t^-decay_rate, b2_cap) at update t, and has no relation to the size of parameters.

    Args:
      momentum: of the direction, without debiasing; None for none.
      momentum_dtype: in which it is kept.
      decay_rate: see above.
      b2_cap: see above.
      clipping_threshold: of the root mean square of each parameter's direction; None for none.
      min_dim_size_to_factor: parameters with a smaller second dimension keep all values.
      eps: added to squared gradients.
    """
    _check_rates(momentum=momentum or 0.0, b2_cap=b2_cap)
    if decay_rate <= 0:
        raise UserError(f"optimizer.decay_rate={decay_rate}: expected above 0")
    if clipping_threshold is not None and clipping_threshold <= 0:
        raise UserError(
            f"optimizer.clipping_threshold={clipping_threshold}: expected above 0, or None"
        )
    parts = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate,
            min_dim_size_to_factor=min_dim_size_to_factor,
            epsilon=eps,
            decay_rate_fn=lambda i, _: jnp.minimum(b2_cap, 1 - jnp.add(i, 1.0) ** -decay_rate),
        )
    ]
    if clipping_threshold is not None:
        parts.append(optax.clip_by_block_rms(clipping_threshold))
    if momentum is not None:
        parts.append(optax.ema(momentum, debias=False, accumulator_dtype=momentum_dtype))
    return Direction(optax.chain(*parts))


def lamb(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    mu_dtype: Dtype = "float32",
    trust_ratio: Literal["all", "decayed"] = "all",
) -> Direction:
    """LAMB (arXiv:1904.00962): Adam's direction with decay, as long as the parameter itself.

    Args:
      b1: of the first moment.
      b2: of the second moment.
      eps: added to its root.
      mu_dtype: of the first moment.
      trust_ratio: which parameters' directions are scaled: "decayed" leaves those as they are
        that do not decay, as fused implementations do.
    """
    _check_rates(b1=b1, b2=b2)

    def scale(mask: DecayMask) -> optax.GradientTransformation:
        return _scale_by_trust_ratio(mask if trust_ratio == "decayed" else None)

    return Direction(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype), scale)


def lars(*, momentum: float = 0.9, trust_coefficient: float = 0.001) -> Direction:
    """LARS (arXiv:1708.03888): momentum of gradients as long as a part of the parameter itself.

    What does not decay is neither scaled.

    Args:
      momentum: of the scaled gradients.
      trust_coefficient: their length, as a part of the parameter's.
    """
    _check_rates(momentum=momentum)
    if trust_coefficient <= 0:
        raise UserError(f"optimizer.trust_coefficient={trust_coefficient}: expected above 0")

    def scale(mask: DecayMask) -> optax.GradientTransformation:
        return optax.chain(_scale_by_trust_ratio(mask, trust_coefficient), optax.trace(momentum))

    return Direction(optax.identity(), scale)


def lion(*, b1: float = 0.9, b2: float = 0.99, mu_dtype: Dtype = "float32") -> Direction:
    """Lion (arXiv:2302.06675): the sign of a momentum."""
    _check_rates(b1=b1, b2=b2)
    return Direction(optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype))


def muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    rms: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: Dtype = "float32",
) -> Direction:
    """Muon for the matrices of attention and MLPs, Adam for everything else.

    A momentum [in, out] is made orthogonal by Newton-Schulz steps and scaled to a root mean square
    of about `rms`, that of Adam's directions, so that both share a learning rate
    (arXiv:2502.16982). Kernels of attention are taken as matrices over all heads.

    Args:
      momentum: of the matrices.
      nesterov: whether it looks ahead.
      ns_steps: Newton-Schulz steps.
      rms: see above.
      b1: of Adam.
      b2: of Adam.
      eps: of both.
      mu_dtype: of the momentum and Adam's first moment.
    """
    _check_rates(momentum=momentum, b1=b1, b2=b2)
    if ns_steps < 1:
        raise UserError(f"optimizer.ns_steps={ns_steps}: expected at least 1")
    if rms <= 0:
        raise UserError(f"optimizer.rms={rms}: expected above 0")
    orthogonal = contrib.scale_by_muon(
        ns_steps=ns_steps,
        beta=momentum,
        eps=eps,
        mu_dtype=mu_dtype,  # pyright: ignore[reportArgumentType]
        nesterov=nesterov,
        weight_dimension_numbers=_matrix_dimensions,
    )
    return Direction(
        optax.partition(
            {
                "matrix": optax.chain(orthogonal, optax.stateless(lambda u, _: _to_rms(u, rms))),
                "other": optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype),
            },
            _label_matrices,
        )
    )


def schedule_free_adamw(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Direction:
    """Schedule-free AdamW (arXiv:2405.15682): an average of the iterates in place of a decay.

    What a run evaluates and saves as its parameters is the average x; gradients are taken between
    it and the iterates z, which are in the state of the optimizer.

    Args:
      b1: share of x in the point of the gradients, above 0.
      b2: of the second moment.
      eps: added to its root.
    """
    _check_rates(b1=b1, b2=b2)
    if not b1:
        raise UserError("optimizer.b1=0: expected above 0 for schedule_free_adamw")
    # Without a first moment, which the average stands for.
    scale = optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
    return Direction(scale, averaging=b1)


DIRECTIONS = {
    "adafactor": adafactor,
    "adam": adamw,
    "adamw": adamw,
    "lamb": lamb,
    "lars": lars,
    "lion": lion,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
    "sgd": sgd,
}


def _check_rates(**rates: float) -> None:
    for key, value in rates.items():
        if not 0 <= value < 1:
            raise UserError(f"optimizer.{key}={value}: expected 0 <= value < 1")


def _scale_by_trust_ratio(
    mask: DecayMask | None, coefficient: float = 1.0
) -> optax.GradientTransformation:
    """As `optax.scale_by_trust_ratio`, but stacked blocks have a ratio for each of them."""

    def scale(path: Any, update: jax.Array, param: jax.Array, chosen: bool) -> jax.Array:
        if not chosen:
            return update
        axes = tuple(range(1 if is_stacked(path_str(path)) else 0, param.ndim))
        ours, theirs = (
            jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) for x in (param, update)
        )
        usable = (ours > 0) & (theirs > 0)
        return update * jnp.where(usable, coefficient * ours / jnp.where(usable, theirs, 1), 1)

    def update(updates: Any, params: Any) -> Any:
        chosen = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
        return jax.tree_util.tree_map_with_path(scale, updates, params, chosen)

    return optax.stateless(update)


# Matrices that map hidden states to hidden states, and the dimensions, from the last, of their
# input and output. Those of the embedding and the head are left to Adam, as the authors of Muon do.
_ATTENTION = r"(.*/)?MultiHeadDotProductAttention_\d+"
_MATRICES = (
    (_ATTENTION + r"/(query|key|value)/kernel", ((-3,), (-2, -1))),
    (_ATTENTION + r"/out/kernel", ((-3, -2), (-1,))),
    (r"(.*/)?(MlpBlock_\d+|token_mixing|channel_mixing)/(Dense_\d|gate)/kernel", ((-2,), (-1,))),
)


def _matrix(path: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Dimensions of the input and the output of a matrix; None for what is none."""
    return next((dims for pattern, dims in _MATRICES if re.fullmatch(pattern, path)), None)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _matrix_dimensions(updates: Any) -> Any:
    """For `scale_by_muon`: its updates have masks in the place of what is no matrix."""

    def dimensions(path: Any, leaf: Any) -> Any:
        dims = _matrix(path_str(path))
        return leaf if dims is None else contrib.MuonDimensionNumbers(*dims)

    return jax.tree_util.tree_map_with_path(dimensions, updates, is_leaf=_is_masked)


def _label_matrices(params: Any) -> Any:
    if not any(_matrix(path) for path in flatten(params)):
        raise UserError(
            "optimizer.name='muon': none of the trained parameters is a matrix of attention or of "
            "an MLP; expected some, or another optimizer"
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "matrix" if _matrix(path_str(path)) else "other", params
    )


def _to_rms(updates: Any, rms: float) -> Any:
    """Scales orthogonal matrices, whose root mean square is 1 / sqrt(max(in, out))."""

    def scale(path: Any, update: jax.Array) -> jax.Array:
        dimensions = _matrix(path_str(path))
        assert dimensions is not None
        size = max(math.prod(update.shape[axis] for axis in axes) for axes in dimensions)
        return update * (rms * math.sqrt(size))

    return jax.tree_util.tree_map_with_path(scale, updates)
