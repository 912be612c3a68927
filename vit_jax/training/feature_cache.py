# SPDX-License-Identifier: Apache-2.0
"""Features of the training images by a frozen tower, computed once and stored in a file."""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.fingerprint import fingerprint
from vit_jax.data.pipeline import DatasetSpec, StoredFeatures, eval_batches
from vit_jax.objectives.base import Batch, CachedFeatures, Objective, Params
from vit_jax.observe.console import log
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.parallel.mesh import process_shards, shard_batch
from vit_jax.runtime.preemption import interruptible
from vit_jax.runtime.processes import fail_together, sum_over_processes
from vit_jax.utils.errors import UserError
from vit_jax.utils.files import atomic_file
from vit_jax.utils.text import describe_size
from vit_jax.utils.tree import flatten


@dataclasses.dataclass
class FeatureCache:
    """The file of features of a run, which `fill` makes or finds.

    Its name is a digest of everything that the features depend on, so that a file is never of
    other weights, another preparation or other data, and runs can share a folder.

    Attributes:
      cached: what is stored, and in which folder.
      objective: gives the features.
      mesh: that they are computed on.
      data: the training data, with its images.
      batch_size: images that are computed at a time.
      description: what else the features depend on, as JSON.
      path: of the file; None before `fill`.
    """

    cached: CachedFeatures
    objective: Objective
    mesh: Mesh
    data: DatasetSpec
    batch_size: int
    description: dict[str, Any]
    path: Path | None = None

    @property
    def spec(self) -> DatasetSpec:
        """The training data with stored features in place of images, for which `fill` is first."""
        stored = StoredFeatures(name=self.cached.name, width=self.cached.width, path=self.path)
        return dataclasses.replace(self.data, features=stored)

    def fill(self, params: Params) -> None:
        """Finds the file that fits the parameters, or computes and writes it.

        It gets its name when it is whole. All processes have to call this; the first one writes the
        file, in a folder that all of them see.

        Raises:
          UserError: the file can't be written or read.
          Preempted: the job was asked to stop.
        """
        path = self.locate(params)
        is_first = jax.process_index() == 0
        if sum_over_processes(is_first and not path.exists())[0]:
            log(f"{path}: features of the images are computed once, and then read from this file")
            # An error of the first process ends the others, see `Heartbeat`.
            if is_first:
                self._write(path, params)
                log(f"wrote {path} ({describe_size(path.stat().st_size)})")
            else:
                collections.deque(self._compute(params), maxlen=0)
            sum_over_processes(1)  # None reads the file before it is there.
        else:
            log(f"{path}: features of the images are read from this file")
        self.path = path
        with fail_together():
            self.spec.read_features()

    def locate(self, params: Params) -> Path:
        """The path of the file for these parameters, which need not exist."""
        stated = {
            "model": self.description,
            "preprocess": self.data.preprocess,
            "data": [self.data.name, self.data.split, [m[:2] for m in self.data.mixture]],
            "records": fingerprint(self.data.open()),
        }
        digest = hashlib.sha256(json.dumps(stated, sort_keys=True, default=str).encode())
        replicated = NamedSharding(self.mesh, PartitionSpec())
        whole = jax.jit(lambda x: x, out_shardings=replicated)(params[self.cached.part])
        for name, x in sorted(flatten(whole).items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(x).tobytes())
        name = f"{self.cached.name}-{digest.hexdigest()[:16]}.npy"
        return Path(self.cached.folder).expanduser() / name

    def _write(self, path: Path, params: Params) -> None:
        total = len(self.data.open())
        shape = (total, self.cached.width)
        key = f"objective.feature_cache={self.cached.folder!r}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            needed, free = 4 * math.prod(shape), shutil.disk_usage(path.parent).free
            if needed > free:
                raise UserError(
                    f"{key}: features of {total:,} images take {describe_size(needed)}, and "
                    f"{describe_size(free)} are free: expected a folder on another disk"
                )
            with atomic_file(path, sync=True) as temporary, temporary.open("wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for rows in self._compute(params):
                    file.write(np.ascontiguousarray(rows, "<f4").tobytes())
        except OSError as e:
            raise UserError(f"{key}: {path} can't be written: {e.strerror or e}") from e

    def _compute(self, params: Params) -> Iterator[np.ndarray]:
        """Yields features, float32 `[n, width]`, NaN for images that can't be read."""
        total = left = len(self.data.open())
        data = dataclasses.replace(self.data, tokenizer=None, batch_size=self.batch_size)
        shards, num_shards = process_shards(self.mesh)
        # Training counts them: it meets the same records.
        batches = eval_batches(data, shards=shards, num_shards=num_shards, corrupt=CorruptCounter())
        with ProgressLog("features", total=total, unit="images") as progress:
            for batch in interruptible(batches):
                rows = np.asarray(self._embed(params, shard_batch(batch, self.mesh)))[:left]
                yield rows
                left -= len(rows)
                progress.advance(len(rows))

    @functools.cached_property
    def _embed(self) -> Callable[..., jax.Array]:

        def embed(params: Params, batch: Batch) -> jax.Array:
            features = self.objective.predict(params, batch)[self.cached.name].astype(jnp.float32)
            return jnp.where(batch["mask"][:, None] > 0, features, jnp.nan)

        return jax.jit(embed, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
