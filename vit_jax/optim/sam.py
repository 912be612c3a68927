# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware minimisation: the gradient at the highest loss nearby."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sam:
    """SAM (arXiv:2010.01412), or GSAM (arXiv:2203.08065) with `alpha`.

    Attributes:
      rho: norm of the step towards a higher loss, over all trained parameters.
      rho_min: the norm falls from `rho` to this as the learning rate falls from its peak to 0; None
        for a constant norm.
      alpha: factor of the surrogate gap: the share of the gradient's component orthogonal to the
        perturbed gradient that is subtracted; 0 for SAM.
    """

    rho: float
    rho_min: float | None = None
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.rho <= 0:
            raise UserError(f"optimizer.sam.rho={self.rho}: expected above 0")
        if self.rho_min is not None and not 0 <= self.rho_min <= self.rho:
            raise UserError(
                f"optimizer.sam.rho_min={self.rho_min}: expected 0 to rho={self.rho}, or None"
            )
        if self.alpha < 0:
            raise UserError(f"optimizer.sam.alpha={self.alpha}: expected at least 0")

    def radius(self, relative_lr: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        """Returns the norm of the step, given the learning rate over its peak (scalars)."""
        if self.rho_min is None:
            return self.rho
        return self.rho_min + (self.rho - self.rho_min) * relative_lr

    def perturb(self, params: Any, grads: Any, radius: jax.typing.ArrayLike) -> Any:
        """Returns parameters moved along the gradient by a norm of `radius`; dtypes are kept."""
        scale = radius / jnp.maximum(optax.tree.norm(grads), 1e-12)
        return jax.tree.map(lambda p, g: (p + scale * g).astype(p.dtype), params, grads)

    def combine(self, grads: Any, perturbed: Any) -> Any:
        """Combines the gradients at the parameters and at the perturbed ones, trees of one shape.

        The result is `perturbed` minus `alpha` times the component of `grads` orthogonal to it.
        """
        if not self.alpha:
            return perturbed
        share = optax.tree.vdot(grads, perturbed) / jnp.maximum(
            optax.tree.vdot(perturbed, perturbed), 1e-30
        )
        return jax.tree.map(lambda g, p: p - self.alpha * (g - share * p), grads, perturbed)
