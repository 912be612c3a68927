# SPDX-License-Identifier: Apache-2.0
"""How well hidden patches are predicted, over a whole split and in a picture."""

import dataclasses
import functools
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.pipeline import DatasetSpec, eval_batches
from vit_jax.evaluators.base import check_every, map_split, replicate_outputs
from vit_jax.objectives.base import Batch, Objective, Params
from vit_jax.objectives.mae import MaskedAutoencoder
from vit_jax.observe.console import log
from vit_jax.parallel.mesh import process_shards, shard_batch
from vit_jax.utils.errors import UserError

# Images in the picture, and the least pixels that each is enlarged to.
_SHOWN = 8
_LEAST = 64


def batch_sums(
    params: Params, batch: Batch, *, objective: MaskedAutoencoder
) -> dict[str, jax.Array]:
    """Sums over the examples of a batch whose mask is 1."""
    loss = objective.reconstruct(params, batch)["loss"]
    return {"loss": jnp.sum(batch["mask"] * loss), "count": jnp.sum(batch["mask"])}


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The loss of a masked autoencoder, with the same masks each time.

    Attributes:
      name: prefix of its metrics, such as `val`.
      data: the split.
      every: steps between evaluations; 0 for the end only.
      objective: a masked autoencoder.
      mesh: that the batches are put on.
    """

    name: str
    data: DatasetSpec
    every: int
    objective: MaskedAutoencoder
    mesh: Mesh

    metrics = ("loss",)

    @functools.cached_property
    def _batch_sums(self):
        return replicate_outputs(functools.partial(batch_sums, objective=self.objective), self.mesh)

    @functools.cached_property
    def _corrupt(self) -> CorruptCounter:
        return CorruptCounter()

    def open(self) -> None:
        self.data.open()

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns the mean `loss` and the `count` of examples seen; details are a picture.

        Raises:
          UserError: no image can be read.
        """
        sums = list(
            map_split(
                self._batch_sums,
                params,
                self.data,
                name=self.name,
                mesh=self.mesh,
                corrupt=self._corrupt,
            )
        )
        loss, count = (sum(float(s[key]) for s in sums) for key in ("loss", "count"))
        if not count:
            raise UserError(f"evals.{self.name}: no image of {self.data.split} can be read")
        if details is not None:
            self._write_picture(params, Path(f"{details}.png"))
        return {"loss": loss / count, "count": int(count)}

    def _write_picture(self, params: Params, path: Path) -> None:
        """Writes the first images, masked and reconstructed; process 0 alone does."""
        shards, num_shards = process_shards(self.mesh)
        batches = eval_batches(self.data, shards=shards, num_shards=num_shards)
        show = replicate_outputs(functools.partial(_show, objective=self.objective), self.mesh)
        rows = jax.device_get(show(params, shard_batch(next(batches), self.mesh)))
        if jax.process_index() > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_grid(rows))
        log(f"wrote {path}: images, what is left of them, and what is predicted")


def _show(params: Params, batch: Batch, *, objective: MaskedAutoencoder) -> list[jax.Array]:
    found = objective.reconstruct(params, batch)
    rows = (batch["image"], found["masked"], found["reconstructed"])
    return [row[:_SHOWN].astype(jnp.float32) for row in rows]


def encode_grid(rows: list[np.ndarray]) -> bytes:
    """A PNG of rows of images, float `[images, height, width, 3]` from 0 to 255."""
    lines = [np.concatenate(list(row), axis=1) for row in rows]
    grid = np.clip(np.rint(np.concatenate(lines)), 0, 255).astype(np.uint8)
    times = max(1, -(-_LEAST // rows[0].shape[2]))
    grid = grid.repeat(times, axis=0).repeat(times, axis=1)
    return cv2.imencode(".png", grid[..., ::-1])[1].tobytes()


def make_reconstruction(
    *, name: str, data: DatasetSpec, objective: Objective, mesh: Mesh, every: int = 0
) -> Reconstruction:
    """A `Reconstruction` from config values, checked."""
    check_every(every, name=name)
    if not isinstance(objective, MaskedAutoencoder):
        raise UserError(
            f"evals.{name}.name='reconstruction' judges objective.name='mae'; expected "
            "'classification' here"
        )
    return Reconstruction(name, data, every, objective, mesh)
