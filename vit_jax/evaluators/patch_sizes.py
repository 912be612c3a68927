# SPDX-License-Identifier: Apache-2.0
"""Classification with patches of several sizes, as FlexiViT is evaluated."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.evaluators.base import Columns, Evaluator
from vit_jax.evaluators.classification import Classification
from vit_jax.objectives.base import Batch, Params
from vit_jax.observe.console import log_lines
from vit_jax.utils.errors import UserError

# Metrics that the table has a column for, and the means over sizes among the results.
_COLUMNS = ("top1", "top5", "loss", "ece")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchSizes(Evaluator):
    """Judges the logits of a model at several sizes of its patches, and logs one table.

    Its results are those of `Classification` for each size, such as `p16_top1`, and the means of
    `top1` and `loss` over the sizes. Source: arXiv:2212.08013, figure 6.

    Attributes:
      sizes: of patches in pixels; `()` for `model.patch_sizes`.
    """

    sizes: tuple[int, ...] = ()

    judges_head = True
    takes_patches = False

    def __post_init__(self) -> None:
        super().__post_init__()
        model: Any = getattr(self.objective, "model", None)
        if not hasattr(model, "at_patch_size"):
            raise UserError(
                f"evals.{self.name}.name='patch_sizes': expected model.name='vit', whose patches "
                "are resized, and an objective of that model"
            )
        sizes = tuple(self.sizes) or model.patch_sizes
        object.__setattr__(self, "sizes", sizes)
        self.check(bool(sizes), "sizes", "some, such as (8, 16), or model.patch_sizes")
        if model.posemb_grid is None and model.position_embedding == "learned":
            raise UserError(
                f"evals.{self.name}.sizes={sizes}: each size has a grid of its own, to which "
                "position embeddings are resized: expected model.posemb_grid, such as (7, 7)"
            )
        if model.relative_positions:
            raise UserError(
                f"evals.{self.name}.sizes={sizes} with model.position_embedding='relative', whose "
                "biases are of one grid, and each size has its own: expected another embedding, or "
                f"evals.{self.name}.name='classification'"
            )
        shape = self.data.image_shape()
        for size in sizes:
            if size < 1 or any(side % size for side in shape[:2]):
                self.check(False, "sizes", f"divisors of images of {shape[0]}x{shape[1]} pixels")
        _ = self._judges  # An objective without logits is refused.

    @functools.cached_property
    def _judges(self) -> dict[int, Classification]:
        model: Any = getattr(self.objective, "model", None)
        return {
            size: Classification(
                name=f"{self.name}, patches of {size}",
                data=self.data,
                objective=self.objective.with_model(model.at_patch_size(size)),
                mesh=self.mesh,
            )
            for size in self.sizes
        }

    @property
    def metrics(self) -> tuple[str, ...]:
        of_size = self._judges[self.sizes[0]].metrics
        own = (f"p{size}_{metric}" for size in self.sizes for metric in of_size)
        return ("top1", "loss", *own)

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Judges a batch at the first size; see `Classification.judge_batch`."""
        return self._judges[self.sizes[0]].judge_batch(params, batch)

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns the results of each size, with those of `Classification`, and their means."""
        found = {}
        for size, judge in self._judges.items():
            files = None if details is None else Path(f"{details}_p{size}")
            found[size] = judge.run(params, details=files)
        log_lines(self._table(found))
        means = {
            metric: sum(result[metric] for result in found.values()) / len(found)
            for metric in ("top1", "loss")
        }
        first = found[self.sizes[0]]
        counts = {name: first[name] for name in ("count", "corrupt") if name in first}
        every = {
            f"p{size}_{metric}": value
            for size, result in found.items()
            for metric, value in result.items()
            if metric not in counts
        }
        return means | every | counts

    def _table(self, found: Mapping[int, Mapping[str, float]]) -> list[str]:
        height, width = self.data.image_shape()[:2]
        columns = [name for name in _COLUMNS if name in found[self.sizes[0]]]
        lines = [
            f"{self.name}: {self.data.split} of {self.data}",
            "".join([f"{'patch':>7}{'tokens':>8}", *(f"{name:>9}" for name in columns)]),
        ]
        for size, result in found.items():
            tokens = (height // size) * (width // size)
            values = "".join(f"{result[name]:>9.4f}" for name in columns)
            lines.append(f"{size:>7}{tokens:>8}{values}")
        return lines
