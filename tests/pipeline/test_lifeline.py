"""A process whose work is done ends at once, with its own exit code, and nothing that it was to say is lost."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from pipeline.lifeline import left_at_once

class Heavy:
    def __del__(self):
        print("taken apart")

heavy = Heavy()
with left_at_once():
    atexit.register(print, "handled")
    print("worked")
    {ending}
"""


def run(script):
    """A process that keeps what it says until it ends."""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ending", "code", "at_once"),
    [
        ("pass", 0, True), ("sys.exit()", 0, True), ("sys.exit(3)", 3, True), ("sys.exit('a word')", 1, False),
        ("raise RuntimeError('a word')", 1, False),
    ],
)  # fmt: skip
def test_what_is_done_ends_at_once_and_what_failed_is_told(ending, code, at_once):
    done = run(SCRIPT.format(ending=ending))
    assert done.returncode == code
    assert done.stdout.splitlines() == ["worked", "handled"] + ["taken apart"] * (not at_once)
    assert ("a word" in done.stderr) == (not at_once)


def test_nobody_needs_to_read_what_it_says():
    closed = "import os\nread, write = os.pipe()\nos.dup2(write, 1)\nos.close(write)\nos.close(read)\n"
    done = run(closed + SCRIPT.format(ending="pass"))
    assert (done.returncode, done.stderr) == (0, "")
