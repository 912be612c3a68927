# SPDX-License-Identifier: Apache-2.0
"""How much memory a file of parameters may ask for."""

# Parameters hardly compress: a file that would become so many times as long is none of them.
_MAX_RATIO = 20
_MIN_BOUND = 1 << 26


def check_size(stored: int, claimed: int) -> None:
    """Called before memory is taken.

    Args:
      stored: bytes that are there.
      claimed: bytes that they say they would become.

    Raises:
      ValueError: these are far more.
    """
    if claimed > _MIN_BOUND + _MAX_RATIO * stored:
        raise ValueError(f"{stored:,} bytes that would become {claimed:,}")
