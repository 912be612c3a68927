# SPDX-License-Identifier: Apache-2.0
"""Retrieval of images by their captions, and of captions by their images.

Protocol: that of Karpathy and Fei-Fei, arXiv:1412.2306, section 4.2, with cosine similarities.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.evaluators.base import Columns, Evaluator, write_details
from vit_jax.evaluators.ranks import rank_matches, recalls
from vit_jax.evaluators.texts import TextEmbedder
from vit_jax.objectives.base import Batch, Params
from vit_jax.utils.errors import UserError

# Pairs with the lowest ranks in the file of details, for each way.
_SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluator):
    """Recall at k: whether a match is among the k most similar ones of the split.

    An image is found by each of its captions; and any of its captions is right for an image.

    Attributes:
      k: numbers of items that are looked at.
      prefix: text before each caption, such as "a photo of ".
      max_captions: captions of an image that count, the first ones; None for all.
    """

    k: tuple[int, ...] = (1, 5, 10)
    prefix: str = ""
    max_captions: int | None = None

    needs_labels = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(min(self.k, default=0) >= 1, "k", "numbers of at least 1, such as (1, 5, 10)")
        self.check(self.max_captions is None or self.max_captions >= 1, "max_captions", "1 or more")
        if not self.data.info.captions:
            raise UserError(
                f"evals.{self.name}.name='retrieval': {self.data} has no captions; expected data "
                "that has"
            )
        _ = self._embedder

    @functools.cached_property
    def _embedder(self) -> TextEmbedder:
        return TextEmbedder(self, kind="retrieval")

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(f"{way}_recall{k}" for way in _WAYS for k in self.k)

    def judge_batch(self, params: Params, batch: Batch) -> tuple[Columns, Columns]:
        """Columns: `zimg`, float32 `[batch, width]`."""
        return {}, {"zimg": self.objective.predict(params, batch)["zimg"]}

    def run(self, params: Params, *, details: Path | None = None) -> dict[str, float]:
        """Returns recalls of both ways as fractions, and the `count` of images and of `captions`.

        Details are a JSON file with the results, and the pairs of each way whose ranks are the
        worst.
        """
        _, count, rows = self.sum_split(params)
        captions, images = self._read_captions(rows["index"])
        texts = [self.prefix + caption for caption in captions]
        ztxt = self._embedder.embed(params, texts, what="captions")
        of_image, of_text = np.arange(count, dtype=np.int32), images
        sides = {"image": (rows["zimg"], of_image), "text": (ztxt, of_text)}
        results, ranks = {}, {}
        for way in _WAYS:
            (queries, query_ids), (gallery, gallery_ids) = (sides[s] for s in way.split("_to_"))
            ranks[way] = rank_matches(
                queries, gallery, query_ids, gallery_ids, mesh=self.mesh, name=f"{self.name} {way}"
            )
            results |= {f"{way}_recall{k}": x for k, x in recalls(ranks[way], self.k).items()}
        results |= {"count": count, "captions": len(captions)}
        source = self.data.open()
        if corrupt := len(source) - count:
            results["corrupt"] = corrupt
        if details is not None:
            names = [source.describe(int(i)) for i in rows["index"]]
            first = np.searchsorted(images, of_image)
            worst = {
                "image_to_text": [
                    {"image": names[i], "rank": rank, "caption": captions[first[i]]}
                    for i, rank in _find_worst(ranks["image_to_text"])
                ],
                "text_to_image": [
                    {"caption": captions[j], "rank": rank, "image": names[images[j]]}
                    for j, rank in _find_worst(ranks["text_to_image"])
                ],
            }
            write_details(details, {"results": results, "worst": worst})
        return results

    def _read_captions(self, index: np.ndarray) -> tuple[list[str], np.ndarray]:
        """All captions of the records at these positions, and the number of the image of each.

        Numbers are int32, `[captions]`, from 0 in the order of the positions, and do not fall.
        """
        source, captions, images = self.data.open(), [], []
        for image, position in enumerate(index.tolist()):
            several = source.captions(position)[: self.max_captions]
            if not several:
                raise UserError(
                    f"evals.{self.name}: {source.describe(position)} has no caption; expected at "
                    "least one"
                )
            captions += several
            images += [image] * len(several)
        return captions, np.asarray(images, np.int32)


_WAYS = ("image_to_text", "text_to_image")


def _find_worst(ranks: np.ndarray) -> list[tuple[int, int]]:
    """Positions of the highest ranks that are not the best, and the ranks, counted from 1."""
    order: Any = np.argsort(-ranks, kind="stable")[:_SHOWN]
    return [(int(i), int(ranks[i]) + 1) for i in order if ranks[i]]
