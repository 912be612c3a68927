# SPDX-License-Identifier: Apache-2.0
"""The text tower of a loaded model, which embeds texts where its image tower embeds images."""

import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.tokenizers import Tokenizer, parse_tokenizer
from vit_jax.models.text import TextTransformer
from vit_jax.objectives.base import Params
from vit_jax.observe.console import log
from vit_jax.observe.progress_log import ProgressLog
from vit_jax.parallel.mesh import batch_sharding, shard_batch
from vit_jax.utils.class_names import MAX_TEXT
from vit_jax.utils.errors import UserError
from vit_jax.utils.text import printable

# Texts that are computed at a time at most.
_BATCH_SIZE = 256

# Characters of a text in a message.
_SHOWN = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTower:
    """A text tower with its parameters on all devices.

    Attributes:
      module: Flax module, called as `module.apply({"params": params}, tokens, train=False)`.
      params: nested dict of arrays, copied to each device.
      tokenizer: makes tokens of texts; None if it is not known.
      t: logarithm of the factor on products of embeddings of images and texts, float32 `[1]`.
      b: what is added to them then, float32 `[1]`; None for nothing.
      mesh: device mesh over which texts are sharded.
    """

    module: TextTransformer
    params: Params = dataclasses.field(repr=False, compare=False)
    tokenizer: Tokenizer | None
    t: np.ndarray
    b: np.ndarray | None
    mesh: Mesh = dataclasses.field(repr=False)

    @property
    def scale(self) -> float:
        """The factor on the cosine of an image and a text."""
        return float(np.exp(self.t[0]))

    @property
    def bias(self) -> float:
        """What is added to it then: the logit of a pair is `scale * cosine + bias`."""
        return 0.0 if self.b is None else float(self.b[0])

    def encode(self, texts: Any) -> np.ndarray:
        """Returns tokens, int32 `[n, context_length]`, of a text, a list of texts, or tokens.

        Raises:
          UserError: the tokenizer is not known, or the tokens are not those of this model.
        """
        length = self.module.context_length
        if isinstance(texts, str):
            texts = [texts]
        if isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts):
            if not len(texts):
                raise UserError("there are no texts: expected at least one")
            return self._find_tokenizer().encode_all(list(texts))
        tokens = np.asarray(texts)
        integers = np.issubdtype(tokens.dtype, np.integer)
        if not integers or tokens.ndim != 2 or tokens.shape[1] != length or not len(tokens):
            raise UserError(
                f"texts are {tokens.dtype} {list(tokens.shape)}: expected texts, or tokens, int32 "
                f"[n, {length}]"
            )
        if tokens.min() < 0 or tokens.max() >= self.module.vocab_size:
            raise UserError(
                f"tokens are {tokens.min()} to {tokens.max()}: expected 0 to "
                f"{self.module.vocab_size - 1}"
            )
        return tokens.astype(np.int32)

    def embed(self, texts: Any, *, pad_rows: Callable[[int], int]) -> np.ndarray:
        """Returns unit vectors, float32 `[n, width]`, of texts as `encode` takes them.

        How many texts have more tokens than the model reads is logged.

        `pad_rows` gives the batch size in which a number of texts is computed.
        """
        tokens = self.encode(texts)
        texts = [texts] if isinstance(texts, str) else texts
        if isinstance(texts[0], str):
            self._report_cut(texts)
        found = []
        with ProgressLog("texts", total=len(tokens), unit="texts") as progress:
            for start in range(0, len(tokens), _BATCH_SIZE):
                part = tokens[start : start + _BATCH_SIZE]
                padded = np.zeros((pad_rows(len(part)), part.shape[1]), np.int32)
                padded[: len(part)] = part
                batch = shard_batch({"tokens": padded}, self.mesh)
                found.append(np.asarray(self._compute(self.params, batch["tokens"]))[: len(part)])
                progress.advance(len(part))
        return to_unit(np.concatenate(found))

    def find_cut(self, texts: Sequence[str]) -> list[str]:
        """The texts with more tokens than the model reads, whose ends `encode` cuts.

        Raises:
          UserError: the tokenizer is not known.
        """
        tokenizer = self._find_tokenizer()
        return [text for text in texts if tokenizer.count(text) > tokenizer.length]

    def _report_cut(self, texts: Sequence[str]) -> None:
        cut = self.find_cut(texts)
        if cut:
            log(
                f"{len(cut):,} of {len(texts):,} texts have more than {self.module.context_length} "
                f"tokens, and their ends are cut, such as {printable(cut[0][:_SHOWN])!r}"
            )

    def compare(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Logits of all pairs, float32 `[n, m]`, of unit vectors `[n, width]` and `[m, width]`."""
        cosines = images.astype(np.float32) @ texts.astype(np.float32).T
        return np.float32(self.scale) * cosines + np.float32(self.bias)

    def _find_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                "the tokenizer of these weights is not known: expected load_model(..., "
                f"tokenizer=LINE), or --tokenizer=LINE, such as "
                f"'clip(length={self.module.context_length})'"
            )
        return self.tokenizer

    @functools.cached_property
    def _compute(self) -> Callable[..., jax.Array]:
        def run(params: Params, tokens: jax.Array) -> jax.Array:
            return self.module.apply({"params": params}, tokens, train=False)[0].astype("float32")

        return jax.jit(run, out_shardings=batch_sharding(self.mesh))


def check_texts(texts: Any, *, key: str) -> Any:
    """Returns a text or a list of texts as `check_text` does, and anything else as it is.

    Raises:
      UserError: see `check_text`; the error has the number of the text in a list.
    """
    if isinstance(texts, str):
        return check_text(texts, key=key)
    if isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts):
        return [check_text(text, key=f"{key} {i}") for i, text in enumerate(texts, 1)]
    return texts


def check_text(text: str, *, key: str) -> str:
    """Returns a text without white space around it, in Unicode form NFC.

    Raises:
      UserError: it is empty, has control characters, or is longer than a line of a text file may
        be.
    """
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        raise UserError(f"{key} is empty: expected a text")
    if printable(text) != text:
        raise UserError(
            f"{key}, {shorten(text)}, has line breaks or control characters: expected a line of "
            "text"
        )
    if len(text) > MAX_TEXT:
        raise UserError(f"{key}, {shorten(text)}: expected at most {MAX_TEXT:,} characters")
    return text


def shorten(text: str) -> str:
    """Returns a text in quotes, its first characters if it is long."""
    shown = printable(text[:_SHOWN])
    return f"'{shown}'" if len(text) <= _SHOWN else f"'{shown}...' ({len(text):,} characters)"


def to_unit(vectors: Any) -> Any:
    """Divides vectors `[n, width]` of any float dtype, of numpy or JAX, by their lengths."""
    xp = jnp if isinstance(vectors, jax.Array) else np
    return vectors / xp.maximum(xp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def find_tokenizer(
    stated: Mapping[str, Any] | None, given: str | None, *, module: TextTransformer
) -> Tokenizer | None:
    """Returns the tokenizer that is given, or else the one that weights state; None for neither.

    Args:
      stated: `line` and `sha256` of the tokenizer in training, see `Weights.tokenizer`.
      given: a line as in `data.tokenizer`.
      module: of the text tower.

    Raises:
      UserError: the line is wrong, its file is not the one of the training, or its tokens are not
        those of the model.
    """
    line = given or (stated or {}).get("line")
    if line is None:
        return None
    tokenizer = parse_tokenizer(line)
    expected = (stated or {}).get("sha256")
    if expected is not None and tokenizer.sha256 != expected:
        raise UserError(
            f"the tokenizer {line} has a vocabulary file with the checksum {tokenizer.sha256}, and "
            f"the model was trained with one of {expected}: expected that file"
        )
    length, vocab_size = module.context_length, module.vocab_size
    if tokenizer.length != length or tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {line} makes {tokenizer.length} tokens of a vocabulary of "
            f"{tokenizer.vocab_size:,}; the model takes {length} of {vocab_size:,}: expected the "
            "tokenizer that it was trained with"
        )
    return tokenizer
