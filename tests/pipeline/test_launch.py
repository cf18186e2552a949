"""Launchers: the same artifact here and in a process, errors with their exit code, and no child left behind."""

import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipeline.artifacts import Artifact
from pipeline.errors import ExperimentError, PipelineError
from pipeline.experiment import Experiment
from pipeline.launch import launch

PARENT = """
import sys
from pathlib import Path

from pipeline.experiment import Experiment
from pipeline.launch import launch
from toy_stages.toy import Settings, toy

file = Path(sys.argv[1])
experiment = Experiment.load(file, ["resources.launcher=process"])
launch(toy, Path(sys.argv[3]), Settings.of(experiment, {"part": "a"}), (experiment, file), documents=Path(sys.argv[2]))
"""


@pytest.fixture
def by(toy, experiment_file, documents, tmp_path):
    """Launches the toy by the launcher of that name."""
    one = documents("one", "a", "b")

    def launched(launcher, out, **changes):
        resolved = tmp_path / "resolved.toml"
        resolved.write_text(
            Experiment.load(experiment_file, [f"resources.launcher={launcher}"]).dump(), encoding="utf-8"
        )
        experiment = Experiment.load(resolved)
        settings = toy.Settings.of(experiment, {"part": "a", **changes})
        return launch(toy.toy, tmp_path / out, settings, (experiment, resolved), documents=one)

    return launched


def test_a_process_makes_the_same_artifact_as_a_call(by, tmp_path):
    changes = {"text": 'a "b"\n', "limit": None, "tags": ("x y",)}
    here, there = by("inline", "here", **changes), by("process", "there", **changes)
    assert there == Artifact.open(tmp_path / "there")
    assert there.manifest.fingerprint == here.manifest.fingerprint
    assert there.manifest.digest == here.manifest.digest
    assert there.manifest.made["command"] != here.manifest.made["command"]


@pytest.mark.parametrize(("mood", "kind"), [("request", ExperimentError), ("failure", PipelineError)])
def test_a_child_that_fails_raises_an_error_of_its_exit_code_with_the_command(
    by, tmp_path, monkeypatch, capfd, mood, kind
):
    monkeypatch.setenv("TOY_MOOD", mood)
    with pytest.raises(kind) as caught:
        by("process", "out", text="it's", shards=3)
    assert caught.value.exit_code == kind.exit_code
    assert caught.value.where == str(tmp_path / "out")
    assert ("nothing suits me" if mood == "request" else "tired") in capfd.readouterr().err
    typed = shlex.split(caught.value.do.partition("try it alone: ")[2])
    monkeypatch.delenv("TOY_MOOD")
    assert subprocess.run(typed, capture_output=True, check=False).returncode == 0
    assert Artifact.open(tmp_path / "out").table()["text"].to_pylist() == ["it's"] * 6


def test_an_interpreter_of_its_own_is_used(by, experiment_file, tmp_path, toy, documents):
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\ntouch "{tmp_path}/used"\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    changes = ["resources.launcher=process", f"resources.python.toy={wrapper}"]
    experiment = Experiment.load(experiment_file, changes)
    settings = toy.Settings.of(experiment, {"part": "a"})
    launch(toy.toy, tmp_path / "out", settings, (experiment, experiment_file), documents=tmp_path / "one")
    assert (tmp_path / "used").exists()


def alive(pids):
    found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process.pid for process in found if process.status() != psutil.STATUS_ZOMBIE]


def wait_until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_parent_ends_its_child_and_grandchild(
    toy, documents, experiment_file, diary, tmp_path, monkeypatch, how
):
    one = documents("one", "a")
    monkeypatch.setenv("TOY_MOOD", "sleepy")
    words = [sys.executable, "-c", PARENT, str(experiment_file), str(one), str(tmp_path / "out")]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as parent:
        try:
            assert wait_until(lambda: len(diary("sleepers")) == 2)
            sleepers = [int(pid) for pid in diary("sleepers")]
            assert len(alive(sleepers)) == 2
            parent.send_signal(how)
            assert parent.wait(20) != 0
            assert wait_until(lambda: not alive(sleepers)), alive(sleepers)
        finally:
            for pid in alive([int(pid) for pid in diary("sleepers")]):
                os.kill(pid, signal.SIGKILL)
            parent.kill()
    assert not (tmp_path / "out").exists()
