# SPDX-License-Identifier: Apache-2.0
"""Bounds the memory that reading an untrusted file of parameters may take."""

# Parameters hardly compress: a file that would grow by this factor does not hold parameters.
_MAX_RATIO = 20
_MIN_BOUND = 1 << 26


def check_size(stored: int, claimed: int) -> None:
    """Checks the size that a file claims for its arrays, before they are allocated.

    Args:
      stored: bytes of the file.
      claimed: bytes of its arrays, by its own headers.

    Raises:
      ValueError: the claim is far larger than the file.
    """
    if claimed > _MIN_BOUND + _MAX_RATIO * stored:
        raise ValueError(f"{stored:,} bytes that would become {claimed:,}")
