# SPDX-License-Identifier: Apache-2.0
"""Classification of images by texts: the class whose prompts are the most similar.

Source: arXiv:2103.00020 (CLIP), section 3.1.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.data.pipeline import DatasetSpec
from vit_jax.evaluators.classification import Classification
from vit_jax.evaluators.features import put
from vit_jax.evaluators.prompts import (
    average_prompts,
    find_class_names,
    find_templates,
    write_prompts,
)
from vit_jax.evaluators.texts import TextEmbedder
from vit_jax.objectives.base import Batch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShot(Classification):
    """Judges the similarities of images and classes, by the scale and bias of the objective.

    The vector of a class is that of the mean of the unit vectors of its prompts. Where an image may
    have several labels, a prediction is right if it is one of them, and images without do not
    count.

    Attributes:
      class_names: a text file with one name a line, in the order of labels, or names; None for
        those of the data.
      templates: a name of `prompts.TEMPLATES`, one or several templates with `{}` for the name, or
        a text file with one a line.
    """

    class_names: str | tuple[str, ...] | None = None
    templates: str | tuple[str, ...] = "photo"

    judges_head = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._embedder

    def check_objective(self) -> None:
        """Any contrastive objective does; see `TextEmbedder`."""

    @functools.cached_property
    def _embedder(self) -> TextEmbedder:
        return TextEmbedder(self, kind="zero_shot")

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each class; raises `UserError`, see `prompts.find_class_names`."""
        info = self.data.info
        return find_class_names(
            self.class_names,
            info.class_names,
            count=info.num_classes,
            owner=str(self.data),
            key=f"evals.{self.name}.class_names",
        )

    @functools.cached_property
    def prompts(self) -> list[str]:
        """All prompts; raises `UserError`, see `prompts.find_templates`."""
        templates = find_templates(self.templates, key=f"evals.{self.name}.templates")
        return write_prompts(self.names, templates)

    def open(self) -> None:
        super().open()
        self._embedder.check_lengths(self.prompts, what="prompts")

    def map_split(
        self, fn: Callable[[Params, Batch], Any], params: Params, data: DatasetSpec | None = None
    ) -> Generator[Any, None, None]:
        # Captions of the images are not read: one may be missing.
        return super().map_split(fn, params, data or dataclasses.replace(self.data, tokenizer=None))

    def embed_classes(self, params: Params) -> np.ndarray:
        """Returns the unit vector of each class, float32 `[classes, width]`."""
        embeddings = self._embedder.embed(params, self.prompts, what="prompts")
        count = len(self.names)
        labels = np.repeat(np.arange(count), len(self.prompts) // count)
        return average_prompts(embeddings, labels, count)

    def compute_logits(self, params: Params, batch: Batch) -> jax.Array:
        """Logits of all classes, float32 `[batch, classes]`, with the parameters of `run`."""
        zimg = self.objective.predict(params["model"], batch)["zimg"]
        similarities = jax.numpy.matmul(
            zimg, params["classes"].T, precision=jax.lax.Precision.HIGHEST
        )
        objective: Any = self.objective
        return objective.scale_similarities(params["model"], similarities)

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns and writes what `Classification.run` does, of the classes by their prompts."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        classes = put(self.embed_classes(params), everywhere)
        return super().run({"model": params, "classes": classes}, details=details)

    def describe_details(self) -> dict[str, Any]:
        return {"prompts": self.prompts}

    def judge_rows(
        self, rows: dict[str, np.ndarray]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        results, classes = super().judge_rows(rows)
        if "logits" in rows:
            labels = rows["label"] > 0
            hits = labels[np.arange(len(labels)), rows["logits"].argmax(axis=1)]
            labelled = labels.any(axis=1)
            results["top1"] = float(hits[labelled].mean()) if labelled.any() else 0.0
        for record, name in zip(classes, self.names, strict=True):
            record["name"] = name
        return results, classes
