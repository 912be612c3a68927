# SPDX-License-Identifier: Apache-2.0
"""Ranks images by how similar they are to a text, or to another image."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vit_jax.data.corrupt import CorruptCounter
from vit_jax.data.ops.decode import ImageError, decode_image
from vit_jax.data.sources.files import Files
from vit_jax.inference.draw import encode_jpeg
from vit_jax.inference.labels import check_lengths
from vit_jax.inference.model import IMAGE_EMBED, LoadedModel
from vit_jax.inference.stream import map_images
from vit_jax.inference.texts import check_text, to_unit
from vit_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Match:
    """An image that was found.

    Attributes:
      path: of its file.
      score: cosine of the angle between its vector and that of the query, -1 to 1.
    """

    path: str
    score: float


@dataclasses.dataclass(frozen=True)
class Query:
    """What is searched for.

    Attributes:
      vector: unit vector, float32 `[width]`.
      layer: layer of the image model whose output it is compared with.
    """

    vector: np.ndarray
    layer: str


def embed_query(
    model: LoadedModel, *, text: str | None = None, image: str | None = None, key: str = "QUERY"
) -> Query:
    """Embeds a text, or the image at a path.

    Images are compared by the vectors that texts are compared with, or, by a model without a text
    tower, by the inputs of its head.

    Args:
      model: of images and texts; for an image as query any other will do.
      text: to search for.
      image: path of an image to search for, in place of a text.
      key: what the user calls the text, for errors.

    Raises:
      UserError: the model has no text tower, the text is empty, has control characters or more
        tokens than the model reads, or the image can't be read.
    """
    if image is not None:
        layer = IMAGE_EMBED if model.texts is not None else "pre_logits"
        features = model.features(model.preprocess(image), layer)
        return Query(_flatten(features)[0], layer)
    text = check_text(text or "", key=key)
    if model.texts is not None:
        check_lengths(model.texts, [text], key=key)
    return Query(model.text_embed(text)[0], IMAGE_EMBED)


def rank_images(
    model: LoadedModel,
    paths: Sequence[str],
    query: Query,
    *,
    top_k: int,
    batch_size: int,
    corrupt: CorruptCounter,
    num_threads: int | None = None,
) -> list[Match]:
    """Returns the `top_k` images that are the most similar to a query, the most similar first.

    Equally similar images are in the order of `paths`. Progress is logged. See `map_images` for the
    other arguments.
    """
    best: list[str] = []
    scores = np.zeros(0, np.float32)
    compute = functools.partial(model.start, layer=query.layer)
    for kept, rows in map_images(
        model,
        paths,
        compute=compute,
        batch_size=batch_size,
        corrupt=corrupt,
        num_threads=num_threads,
    ):
        if not kept:
            continue
        best += kept
        scores = np.concatenate([scores, _flatten(rows) @ query.vector])
        order = np.argsort(-scores, kind="stable")[:top_k]
        best, scores = [best[i] for i in order], scores[order]
    return [Match(path, float(score)) for path, score in zip(best, scores, strict=True)]


def make_thumbnail(path: str, size: int) -> tuple[bytes, tuple[int, int]]:
    """Reads an image and scales it down until no side has more than `size` pixels.

    Returns:
      The bytes of a JPEG file, and its width and height.

    Raises:
      UserError: the image can't be read.
    """
    try:
        picture = Image.fromarray(decode_image(Files("", [path]).read(0), orient=True))
    except ImageError as e:
        raise UserError(f"{path}: {e}") from None
    picture.thumbnail((size, size))
    return encode_jpeg(picture), picture.size


def _flatten(rows: np.ndarray) -> np.ndarray:
    return to_unit(rows.reshape(len(rows), -1))
