# SPDX-License-Identifier: Apache-2.0
"""A command that ends in the way that its first argument names."""

import os
import signal
import sys


def run() -> None:
    """Takes how to end, and an exit code, from `sys.argv`."""
    how, code = sys.argv[1:]
    if how == "exit":
        sys.exit(int(code))
    if how == "crash":
        os._exit(int(code))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise ValueError(code)
