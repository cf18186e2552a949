"""A process that ends when the one that launched it does, however that ended."""

import os
import signal
import threading
from contextlib import suppress
from typing import Final

import psutil

LIFELINE: Final = "RLHF_LIFELINE"
"""Environment variable with the number of a pipe that closes when the process that launched this one ends."""


def hold() -> None:
    """End with the launcher, and with this process all that it has started; without a launcher, do nothing."""
    if (pipe := os.environ.pop(LIFELINE, None)) is not None:
        threading.Thread(target=_end_with_launcher, args=(int(pipe),), daemon=True).start()


def _end_with_launcher(pipe: int) -> None:
    os.read(pipe, 1)  # returns when the other end closes
    end_what_was_started()
    os.killpg(0, signal.SIGKILL)


def end_what_was_started() -> None:
    """Kill all processes that this one and its children have started."""
    for started in psutil.Process().children(recursive=True):  # some are in sessions of their own
        with suppress(psutil.NoSuchProcess):
            started.kill()
