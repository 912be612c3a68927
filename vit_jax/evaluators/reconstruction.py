# SPDX-License-Identifier: Apache-2.0
"""How well hidden patches are predicted, over a whole split and in a picture."""

import contextlib
import dataclasses
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.evaluators.base import Columns, Evaluator, write_file
from vit_jax.objectives.base import Batch, Params
from vit_jax.objectives.mae import MaskedAutoencoder
from vit_jax.observe.console import log
from vit_jax.utils.errors import UserError
from vit_jax.utils.pictures import to_rgb

# Number of images in the picture, and the pixels that each is enlarged to at least.
_SHOWN = 8
_LEAST = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction(Evaluator):
    """The loss of a masked autoencoder, with the same masks each time."""

    objective: MaskedAutoencoder

    needs_labels = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.objective, MaskedAutoencoder):
            raise UserError(
                f"evals.{self.name}.name='reconstruction' is for objective.name='mae'; expected "
                "'classification' here"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss",)

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Columns to sum: `loss`, float32 `[batch]`."""
        return {"loss": self.objective.reconstruct(params, batch)["loss"]}, {}

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns the mean `loss` and the `count` of examples; details are a picture."""
        sums, count, _ = self.sum_split(params)
        if details is not None:
            path = Path(f"{details}.png")
            with contextlib.closing(self.map_split(self.jit(self._show), params)) as batches:
                write_file(path, encode_grid(next(batches)))
            log(f"wrote {path}: images, what is left of them, and what is predicted")
        return {"loss": float(sums["loss"]) / count, "count": count}

    def _show(self, params: Params, batch: Batch) -> list[jax.Array]:
        """The first images, masked and reconstructed."""
        found = self.objective.reconstruct(params, batch)
        rows = (batch["image"], found["masked"], found["reconstructed"])
        return [row[:_SHOWN].astype(jnp.float32) for row in rows]


def encode_grid(rows: list[np.ndarray]) -> bytes:
    """Encodes rows of images, float `[images, height, width, channels]` from 0 to 255, as a PNG."""
    lines = [np.concatenate(list(to_rgb(row)), axis=1) for row in rows]
    grid = np.clip(np.rint(np.concatenate(lines)), 0, 255).astype(np.uint8)
    times = max(1, -(-_LEAST // rows[0].shape[2]))
    grid = grid.repeat(times, axis=0).repeat(times, axis=1)
    return cv2.imencode(".png", grid[..., ::-1])[1].tobytes()
