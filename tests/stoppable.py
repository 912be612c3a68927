# SPDX-License-Identifier: Apache-2.0
"""A command that takes the place of training: it waits for a signal, and notes what it hears."""

import os
import signal
import sys
import time


def run() -> None:
    """Takes the files to write, its exit code and the signals to handle from `sys.argv`."""
    there, heard, code, *numbers = sys.argv[1:]

    def hear(number: int, _: object) -> None:
        with open(heard, "a") as file:
            file.write(f"{number} ")

    for number in numbers:
        signal.signal(int(number), hear)
    with open(f"{there}.part", "w") as file:
        file.write(str(os.getpgid(0)))
    os.rename(f"{there}.part", there)
    signal.pause()
    time.sleep(0.1)
    sys.exit(int(code))
