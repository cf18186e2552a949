"""How a process ends: when the one that launched it does, however that ended; and at once when its work is done."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def left_at_once() -> Iterator[None]:
    """Have this process end with what is within, its exit handlers called and nothing taken apart.

    Python takes two seconds to take torch and its like apart, and torch aborts meanwhile now and then.
    """
    status: list[int] = []
    atexit.register(_leave, status)  # handlers that are registered later are called earlier
    try:
        yield
        status.append(0)
    except SystemExit as said:
        if said.code is None or isinstance(said.code, int):
            status.append(said.code or 0)
        raise


def _leave(status: list[int]) -> None:
    if status:  # none where an error is yet to be told
        with suppress(OSError):  # nobody reads on
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status[0])
