# SPDX-License-Identifier: Apache-2.0
"""A digest that changes with a dataset, from a sample of its records."""

import hashlib

import numpy as np

from vit_jax.data.ops.decode import ImageError
from vit_jax.data.sources.base import Source

_SAMPLES = 16


def fingerprint(source: Source) -> str:
    """Hexadecimal digest of the number of records and of 16 records that are evenly spread."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLES).astype(int)):
        try:
            record = source[int(index)]
        except ImageError:
            digest.update(b"unreadable")
            continue
        for key in ("image", "label"):
            value = record[key]
            digest.update(value if isinstance(value, bytes) else np.asarray(value).tobytes())
    return digest.hexdigest()[:16]
