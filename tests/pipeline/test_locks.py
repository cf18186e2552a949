"""Locks: held by one process, said by whom, and gone with it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.errors import BusyError
from pipeline.locks import held, holder, is_held

HOLD = "import sys, time; from pathlib import Path; from pipeline.locks import held\n" \
       "with held(Path(sys.argv[1]), 'this'):\n    print('held', flush=True); time.sleep(60)"  # fmt: skip


@pytest.fixture
def elsewhere(tmp_path):
    """Another process that holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_holder_is_told_who_the_first_is(tmp_path, elsewhere):
    with (
        pytest.raises(BusyError, match=f"process {elsewhere.pid} on .* is at the run x"),
        held(tmp_path / "lock", "the run x"),
    ):
        pytest.fail("both hold it")
    assert is_held(tmp_path / "lock")


def test_a_killed_process_holds_nothing(tmp_path, elsewhere):
    os.kill(elsewhere.pid, signal.SIGKILL)
    elsewhere.wait()
    assert not is_held(tmp_path / "lock")
    with held(tmp_path / "lock", "it"):
        assert f"process {os.getpid()} on" in holder(tmp_path / "lock")
    assert holder(tmp_path / "lock") == "another process"


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path, elsewhere):
    killer = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.5; kill -9 {elsewhere.pid}"])
    began = time.monotonic()
    with held(tmp_path / "lock", "it", wait=True):
        assert time.monotonic() - began > 0.3
    killer.wait()


def test_a_lock_that_nobody_made_is_not_held(tmp_path):
    assert not is_held(tmp_path / "none")


def test_a_lock_is_let_go_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path / "lock", "it"):
        1 / 0  # noqa: B018  for its error
    assert not is_held(tmp_path / "lock")
