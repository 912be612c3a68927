# SPDX-License-Identifier: Apache-2.0
"""Embeds texts by the text tower of a contrastive objective, on the mesh."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.data.tokenizers import Tokenizer, parse_tokenizer
from vit_jax.evaluators.base import Evaluator
from vit_jax.evaluators.features import shard_rows
from vit_jax.objectives.base import Params
from vit_jax.objectives.contrastive import Contrastive
from vit_jax.observe.console import log
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.runtime.preemption import interruptible
from vit_jax.utils.errors import UserError

# Characters of a text in a message.
_SHOWN = 60


class TextEmbedder:
    """Embeds texts for one evaluator.

    Args:
      evaluator: gives the mesh, the objective, the tokenizer and the batch size.
      kind: name of the evaluator in the config, for errors.

    Raises:
      UserError: the objective has no text tower, or there is no tokenizer.
    """

    def __init__(self, evaluator: Evaluator, *, kind: str):
        self._evaluator = evaluator
        key = f"evals.{evaluator.name}"
        if not isinstance(evaluator.objective, Contrastive):
            raise UserError(
                f"{key}.name={kind!r} compares images with texts, and is for "
                "objective.name='contrastive'; expected 'classification' here"
            )
        if evaluator.data.tokenizer is None:
            raise UserError(f"data.tokenizer=None with {key}.name={kind!r}: expected one")
        self._objective = evaluator.objective
        self._truncated: set[str] = set()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the data; raises `UserError` if its line is wrong."""
        return parse_tokenizer(self._evaluator.data.tokenizer or "")

    @functools.cached_property
    def _embed(self):
        return jax.jit(
            self._objective.embed_texts,
            out_shardings=NamedSharding(self._evaluator.mesh, PartitionSpec()),
        )

    def check_lengths(self, texts: Sequence[str], *, what: str) -> None:
        """Logs once how many texts have more tokens than the model reads, and are cut.

        Raises `UserError` if the file of the tokenizer can't be read.
        """
        length = self.tokenizer.length
        cut = [text for text in dict.fromkeys(texts) if self.tokenizer.count(text) > length]
        if cut and what not in self._truncated:
            self._truncated.add(what)
            log(
                f"{self._evaluator.name}: {len(cut):,} of {len(set(texts)):,} {what} have more "
                f"than {length} tokens, and their ends are cut, such as {cut[0][:_SHOWN]!r}"
            )

    def embed(self, params: Params, texts: Sequence[str], *, what: str) -> np.ndarray:
        """Returns unit vectors, float32 `[texts, width]`; equal texts are embedded once.

        Args:
          params: of the objective, on the mesh.
          texts: any number.
          what: they are, such as "captions", for the log.

        Raises:
          Preempted: the job was asked to stop.
        """
        self.check_lengths(texts, what=what)
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        distinct, size, found = list(place), self._evaluator.data.batch_size, []
        mesh, name = self._evaluator.mesh, self._evaluator.name
        with ProgressLog(f"{name}: {what}", total=len(distinct), unit="texts") as progress:
            for start in interruptible(range(0, len(distinct), size)):
                block = self.tokenizer.encode_all(distinct[start : start + size])
                embedded = self._embed(params, shard_rows(block, mesh, size=size))
                found.append(np.asarray(embedded)[: len(block)])
                progress.advance(len(block))
        return np.concatenate(found)[[place[text] for text in texts]]
