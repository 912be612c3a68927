# SPDX-License-Identifier: Apache-2.0
"""Bounds the memory that reading an untrusted file of parameters may take."""

# Parameters hardly compress: a file that would grow by this factor does not hold parameters.
_MAX_RATIO = 20
_MIN_BOUND = 1 << 26


def check_size(stored: int, claimed: int) -> None:
    """Raises ValueError if the arrays of a file of `stored` bytes would have far more bytes.

    By the headers of the file they have `claimed` bytes; this is checked before they are allocated.
    """
    if claimed > _MIN_BOUND + _MAX_RATIO * stored:
        raise ValueError(f"{stored:,} bytes that would become {claimed:,}")
