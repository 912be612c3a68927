# SPDX-License-Identifier: Apache-2.0
"""Compares the kernels that a model runs with plain XLA before a run, on the device that it has.

A kernel that gives other numbers on a new device, or with a new version of its compiler, would
train a wrong model in silence.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.interface import Model, unsharded
from vit_jax.models.patches import PatchBatch
from vit_jax.observe.console import log
from vit_jax.utils.errors import UserError, describe_error
from vit_jax.utils.tree import flatten

# Fields of a model that choose kernels, and their values that are not plain XLA.
_CHOICES, _KERNELS = ("attention", "blocks"), ("fused", "pallas")

# Of the norm of a gradient: two ways to compute in bfloat16 differ by about 0.01.
_TOLERANCE = 0.1


def check_kernels(model: Model, image_shape: tuple[int, int, int], *, per_row: int = 1) -> None:
    """Compares outputs and gradients of one block with and without kernels, in training.

    Args:
      model: with its kernels chosen for the devices of the run.
      image_shape: height, width and channels; of a column of patches, if the model takes those.
      per_row: number of images that share a row of patches.

    Raises:
      UserError: they differ, or a kernel can't be compiled or run.
    """
    if hasattr(model, "towers"):
        for tower in model.towers.values():
            check_kernels(tower, image_shape, per_row=per_row)
        return
    chosen = {name: getattr(model, name, None) for name in _CHOICES}
    chosen = {name: kind for name, kind in chosen.items() if kind in _KERNELS}
    if not chosen:
        return
    # One block without randomness, on one device.
    names = {field.name for field in dataclasses.fields(model)}
    off = {name: 0.0 for name in names if name.endswith("_rate")}
    one = unsharded(model).clone(num_layers=1, scan=False, remat="none", **off)
    keys = ", ".join(f"model.{name}={kind!r}" for name, kind in chosen.items())
    remedy = " ".join(f"--config.model.{name}=xla" for name in chosen)
    try:
        differs, error = _compare(one.clone(**chosen), one, image_shape, per_row)
    except Exception as e:  # Compilers and drivers raise many types.
        raise UserError(
            f"{keys}: the kernels can't run on this device ({describe_error(e)}); set {remedy}"
        ) from e
    if not error <= _TOLERANCE:
        raise UserError(
            f"{keys}: the kernels give other gradients than XLA on this device ({differs} differs "
            f"by {error:.2g} of its norm); set {remedy}"
        )
    log(f"{keys}: compared with XLA on one block; gradients differ by {error:.1g} of their norm")


def _compare(
    kernels: Any, plain: Any, image_shape: tuple[int, int, int], per_row: int
) -> tuple[str, float]:
    """Returns the array that differs most, and by how much of its norm."""
    rng = jax.random.key(0)
    inputs: Any
    if hasattr(plain, "context_length"):
        inputs = jax.random.randint(rng, (2, plain.context_length), 0, plain.vocab_size)
    elif getattr(plain, "any_size", False):
        inputs = _draw_rows(rng, image_shape, per_row)
    else:
        inputs = jax.random.normal(rng, (2, *image_shape))

    @jax.jit
    def draw_params() -> Any:
        leaves, tree = jax.tree.flatten(plain.init(rng, inputs, train=False)["params"])
        # Random values for all parameters, so that no layer of zeros hides another.
        noisy = [
            x + 0.05 * jax.random.normal(r, x.shape)
            for x, r in zip(leaves, jax.random.split(rng, len(leaves)), strict=True)
        ]
        return jax.tree.unflatten(tree, noisy)

    params = draw_params()

    def run(model: Any) -> dict[str, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            out = model.apply({"params": params}, inputs, train=True)[1]["encoded"]
            out = out.astype(jnp.float32)
            if isinstance(inputs, PatchBatch):  # What padding attends to does not matter.
                valid = inputs.segments > 0
                out = jnp.where(valid[..., None], out[:, -valid.shape[1] :], 0)
            return jnp.mean(out * jax.random.normal(rng, out.shape)), out

        gradients, encoded = jax.jit(jax.grad(loss, has_aux=True))(params)
        return {"encoded": encoded, **flatten(gradients)}

    found, expected = jax.device_get((run(kernels), run(plain)))
    norms = {name: np.linalg.norm(x) for name, x in expected.items()}
    # The gradient of a key's bias is zero but for rounding.
    least = 1e-2 * max(norm for name, norm in norms.items() if name != "encoded")
    errors = {
        name: float(np.linalg.norm(found[name] - x) / np.maximum(norms[name], least))
        for name, x in expected.items()
    }
    name = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else np.inf)
    return name, errors[name]


def _draw_rows(rng: jax.Array, column_shape: tuple[int, int, int], per_row: int) -> PatchBatch:
    """Two rows of images of one patch in height and of equal widths, and padding behind them."""
    height, size, channels = column_shape
    tokens = height // size - 1
    width = max(1, (tokens - 1) // per_row)
    number, place = np.divmod(np.arange(tokens), width)
    ids = np.where(number < per_row, number + 1, 0)
    coordinates = np.stack([np.zeros_like(place), place], axis=-1)
    grids = np.broadcast_to([1, width], (2, per_row, 2))
    return PatchBatch(
        pixels=jax.random.normal(rng, (2, tokens, size, size, channels)),
        coordinates=jnp.asarray(np.tile(coordinates, (2, 1, 1)), jnp.int32),
        grids=jnp.asarray(grids, jnp.int32),
        segments=jnp.asarray(np.tile(ids, (2, 1)), jnp.int32),
    )
