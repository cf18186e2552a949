"""Locks that end with the process that holds them, and say who that is.

The kernel lets go of a lock (`flock`) when its holder ends, however it ends, so no lock outlives a crash. Who holds it
is a note beside it or inside it, for people: what it says never decides anything.
"""

import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import BusyError

PAUSE = 0.2
"""Seconds between two looks at a lock that is waited for."""


def this_process() -> dict[str, Any]:
    """Who this is, for those who find its lock."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": platform.node(), "since": now, "command": shlex.join(sys.argv)}


def holder(note: Path) -> str:
    """Who wrote that it holds a lock, in words."""
    try:
        told = json.loads(note.read_bytes())
        return f"process {told['pid']} on {told['host']} (since {told['since']}: {told['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock of this file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextmanager
def held(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the file `path`, made where it is missing, for as long as the context lasts.

    `wait` waits for the one who holds it. Raises `BusyError`, naming that one, otherwise.
    """
    with path.open("a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not wait:
                    raise BusyError(
                        f"{holder(path)} is at {what}", str(path.parent),
                        "wait for it to end, or end it; then run again: what is done is reused",
                    ) from error  # fmt: skip
                time.sleep(PAUSE)
        file.truncate(0)
        file.write(json.dumps(this_process()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
