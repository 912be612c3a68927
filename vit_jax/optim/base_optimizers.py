# SPDX-License-Identifier: Apache-2.0
"""Base optimizers by name: without clipping, weight decay, learning rate and schedule.

The keyword arguments of each are its keys in a config. The path of state that belongs to a
parameter ends with the parameter's path, by which it is sharded.
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
# Maps a tree of parameters to a tree of bools: whether weight decay applies to each.
DecayMask = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class BaseOptimizer:
    """An optax transformation of gradients, to which `make_optimizer` adds the rest.

    Attributes:
      tx: the transformation, which comes before weight decay.
      after_decay: makes a transformation that comes after weight decay, given which parameters
        decay and by what; None for none.
      averaging: for schedule-free optimizers, the weight of the average in the point at which
        gradients are taken (beta in arXiv:2405.15682); None for the others.
    """

    tx: optax.GradientTransformation
    after_decay: Callable[[DecayMask, float], optax.GradientTransformation] | None = None
    averaging: float | None = None


def sgd(
    *, momentum: float = 0.9, nesterov: bool = False, momentum_dtype: Dtype = "float32"
) -> BaseOptimizer:
    """SGD with momentum."""
    _check_rates(momentum=momentum)
    return BaseOptimizer(
        optax.trace(decay=momentum, nesterov=nesterov, accumulator_dtype=momentum_dtype)
    )


def adamw(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: Dtype = "float32"
) -> BaseOptimizer:
    """Adam (arXiv:1412.6980); with `weight_decay`, AdamW (arXiv:1711.05101)."""
    _check_rates(b1=b1, b2=b2)
    return BaseOptimizer(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype))


def adafactor(
    *,
    momentum: float | None = 0.9,
    momentum_dtype: Dtype = "bfloat16",
    decay_rate: float = 0.8,
    b2_cap: float = 0.999,
    clipping_threshold: float | None = None,
    min_dim_size_to_factor: int = 32,
    eps: float = 1e-30,
) -> BaseOptimizer:
    """Adafactor (arXiv:1804.04235) as changed for ViTs (arXiv:2106.04560, section 3.3).

    The second moment of the two largest dimensions is factored into means over each of them. It
    decays by min(1 - t^-decay_rate, b2_cap) at update t. Updates are not scaled by the norm of the
    parameter.

    Args:
      momentum: decay of the average of updates, without debiasing; None for no average.
      momentum_dtype: dtype of this average.
      decay_rate: exponent of the decay of the second moment, see above.
      b2_cap: upper bound of this decay.
      clipping_threshold: upper bound of the root mean square of each parameter's update; None for
        no bound.
      min_dim_size_to_factor: a parameter is not factored if its second largest dimension is smaller
        than this.
      eps: added to squared gradients.
    """
    _check_rates(momentum=momentum or 0.0, b2_cap=b2_cap)
    _check_above_0(decay_rate=decay_rate)
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
    return BaseOptimizer(optax.chain(*parts))


def lamb(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    mu_dtype: Dtype = "float32",
    trust_ratio: Literal["all", "decayed"] = "all",
) -> BaseOptimizer:
    """LAMB (arXiv:1904.00962): Adam's update with decay, scaled to the norm of the parameter.

    `b1` and `b2` are the decays of the first moment, of `mu_dtype`, and of the second, to whose
    root `eps` is added. `trust_ratio` tells which parameters have their updates scaled: "all", or
    those that are "decayed", as in fused implementations.
    """
    _check_rates(b1=b1, b2=b2)

    def scale(mask: DecayMask, decay: float) -> optax.GradientTransformation:
        return _scale_by_trust_ratio(mask if trust_ratio == "decayed" else None)

    return BaseOptimizer(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype), scale)


def lars(
    *,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
    trust_ratio: Literal["update", "norms"] = "update",
) -> BaseOptimizer:
    """LARS (arXiv:1708.03888): momentum of gradients scaled to the norm of the parameter.

    Gradients of parameters without weight decay are not scaled. With gradient g, parameter w and
    weight decay d, the scaled gradient is c |w| (g + d w) / n with c the `trust_coefficient`. n is
    |g + d w| for `trust_ratio` "update", as in MoCo v3 and the linear probes of MAE, and
    |g| + d |w| + 1e-8 for "norms", as in the paper and timm, which scales nothing if d is 0.
    """
    _check_rates(momentum=momentum)
    _check_above_0(trust_coefficient=trust_coefficient)

    def scale(mask: DecayMask, decay: float) -> optax.GradientTransformation:
        trace = optax.trace(momentum)
        if trust_ratio == "update":
            return optax.chain(_scale_by_trust_ratio(mask, trust_coefficient), trace)
        if not decay:
            return trace
        return optax.chain(_scale_by_trust_ratio(mask, trust_coefficient, decay), trace)

    return BaseOptimizer(optax.identity(), scale)


def lion(*, b1: float = 0.9, b2: float = 0.99, mu_dtype: Dtype = "float32") -> BaseOptimizer:
    """Lion (arXiv:2302.06675): the sign of a momentum."""
    _check_rates(b1=b1, b2=b2)
    return BaseOptimizer(optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype))


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
) -> BaseOptimizer:
    """Muon for the matrices of attention and MLPs, Adam for everything else.

    The momentum of a matrix is orthogonalised by Newton-Schulz iterations and scaled to a root mean
    square of about `rms`, that of Adam's updates, so that both share a learning rate
    (arXiv:2502.16982). A kernel of attention is one matrix over all heads.

    Args:
      momentum: decay of the average of a matrix's gradients.
      nesterov: whether this is Nesterov momentum.
      ns_steps: number of Newton-Schulz iterations.
      rms: root mean square of a matrix's update, see above.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: epsilon of both.
      mu_dtype: dtype of the momentum and of Adam's first moment.
    """
    _check_rates(momentum=momentum, b1=b1, b2=b2)
    if ns_steps < 1:
        raise UserError(f"optimizer.ns_steps={ns_steps}: expected at least 1")
    _check_above_0(rms=rms)
    orthogonal = contrib.scale_by_muon(
        ns_steps=ns_steps,
        beta=momentum,
        eps=eps,
        mu_dtype=mu_dtype,  # pyright: ignore[reportArgumentType]
        nesterov=nesterov,
        weight_dimension_numbers=_matrix_dimensions,
    )
    return BaseOptimizer(
        optax.partition(
            {
                "matrix": optax.chain(orthogonal, optax.stateless(lambda u, _: _to_rms(u, rms))),
                "other": optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype),
            },
            _label_matrices,
        )
    )


def schedule_free_adamw(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> BaseOptimizer:
    """Schedule-free AdamW (arXiv:2405.15682): the iterates are averaged instead of decaying the lr.

    The parameters of a run, which it evaluates and saves, are the average x. The iterates z are in
    the optimizer state, and gradients are taken between both: `b1`, above 0, is the weight of x
    there. `b2` is the decay of the second moment, to whose root `eps` is added.
    """
    _check_rates(b1=b1, b2=b2)
    if not b1:
        raise UserError("optimizer.b1=0: expected above 0 for schedule_free_adamw")
    # There is no first moment: the average takes its place.
    scale = optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
    return BaseOptimizer(scale, averaging=b1)


BASE_OPTIMIZERS = {
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


def _check_above_0(**values: float) -> None:
    for key, value in values.items():
        if value <= 0:
            raise UserError(f"optimizer.{key}={value}: expected above 0")


def _scale_by_trust_ratio(
    mask: DecayMask | None, coefficient: float = 1.0, decay: float | None = None
) -> optax.GradientTransformation:
    """As `optax.scale_by_trust_ratio`, with a ratio for each block of a stack.

    With `decay`, the norm of the update is the sum of those of the gradient and of the decay.
    """

    def scale(path: Any, update: jax.Array, param: jax.Array, chosen: bool) -> jax.Array:
        if not chosen:
            return update
        axes = tuple(range(1 if is_stacked(path_str(path)) else 0, param.ndim))
        gradient = update if decay is None else update - decay * param
        norm, update_norm = (
            jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) for x in (param, gradient)
        )
        usable = (norm > 0) & (update_norm > 0)
        if decay is not None:
            update_norm += decay * norm + 1e-8
        return update * jnp.where(usable, coefficient * norm / jnp.where(usable, update_norm, 1), 1)

    def update(updates: Any, params: Any) -> Any:
        chosen = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
        return jax.tree_util.tree_map_with_path(scale, updates, params, chosen)

    return optax.stateless(update)


# Matrices that map hidden states to hidden states, with the axes of their input and output. Adam
# updates the embedding and the head, as the authors of Muon recommend.
_ATTENTION = r"(.*/)?MultiHeadDotProductAttention_\d+"
_MATRICES = (
    (_ATTENTION + r"/(query|key|value)/kernel", ((-3,), (-2, -1))),
    (_ATTENTION + r"/out/kernel", ((-3, -2), (-1,))),
    (r"(.*/)?(MlpBlock_\d+|token_mixing|channel_mixing)/(Dense_\d|gate)/kernel", ((-2,), (-1,))),
)


def _matrix(path: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the axes of the input and output of a matrix; None for other parameters."""
    return next((dims for pattern, dims in _MATRICES if re.fullmatch(pattern, path)), None)


def _matrix_dimensions(updates: Any) -> Any:
    """The axes that `scale_by_muon` asks for; in its updates all but matrices are masked."""

    def dimensions(path: Any, leaf: Any) -> Any:
        dims = _matrix(path_str(path))
        return leaf if dims is None else contrib.MuonDimensionNumbers(*dims)

    return jax.tree_util.tree_map_with_path(
        dimensions, updates, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode)
    )


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
    """Scales orthogonal matrices, whose root mean square is 1 / sqrt(max(in, out)), to `rms`."""

    def scale(path: Any, update: jax.Array) -> jax.Array:
        dimensions = _matrix(path_str(path))
        assert dimensions is not None
        size = max(math.prod(update.shape[axis] for axis in axes) for axes in dimensions)
        return update * (rms * math.sqrt(size))

    return jax.tree_util.tree_map_with_path(scale, updates)
