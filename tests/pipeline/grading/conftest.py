import os
import time

import psutil
import pytest


@pytest.fixture
def grading_processes():
    """The grading processes below a process (this one unless told)."""

    def look(pid=None):
        found = []
        for child in psutil.Process(pid or os.getpid()).children():
            try:
                if "pipeline.grading.worker" in child.cmdline():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    return look


@pytest.fixture
def until():
    """Wait until a condition gives something true, and return it; fail after some seconds."""

    def wait(condition, seconds=15.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.02)
        raise AssertionError("waited in vain")

    return wait
