# SPDX-License-Identifier: Apache-2.0
"""A digest that changes with a dataset, from a sample of its records."""

import hashlib

import numpy as np

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.base import Source
from vit_jax.data.tokenizers import Tokenizer

_SAMPLES = 16


def fingerprint(source: Source, tokenizer: Tokenizer | None = None) -> str:
    """Hexadecimal digest of the number of records and of 16 records that are evenly spread.

    With a tokenizer, their captions and its vocabulary count too.
    """
    digest = hashlib.sha256(str(len(source)).encode())
    if tokenizer:
        digest.update(str(tokenizer.sha256).encode())
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLES).astype(int)):
        try:
            record = source[int(index)]
        except ImageError:
            digest.update(b"unreadable")
            continue
        for key in ("image", "label", "label_map"):
            if (value := record.get(key)) is not None:
                digest.update(value if isinstance(value, bytes) else np.asarray(value).tobytes())
        if tokenizer:
            digest.update(_digest_captions(source, int(index)))
    return digest.hexdigest()[:16]


def _digest_captions(source: Source, index: int) -> bytes:
    try:
        return "\0".join(source.captions(index)).encode("utf-8", "replace")
    except ImageError:
        return b"unreadable"
