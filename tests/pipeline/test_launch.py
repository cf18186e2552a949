"""Launchers: the same artifact here and in a process, errors with their exit code, and no child left behind."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from pipeline.artifacts import Artifact
from pipeline.errors import EngineError, ExperimentError, InputError, PipelineError
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

    def launched(launcher, out, *said, **changes):
        resolved = tmp_path / "resolved.toml"
        resolved.write_text(
            Experiment.load(experiment_file, [f"resources.launcher={launcher}", *said]).dump(), encoding="utf-8"
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


def test_a_stage_may_have_a_launcher_of_its_own(by):
    own = by("inline", "own", "resources.launchers.toy=process")
    others = by("process", "others", "resources.launchers.toy=inline", "resources.launchers.update=torchrun")
    assert own.manifest.made["command"] != others.manifest.made["command"]
    assert own.manifest.digest == others.manifest.digest


@pytest.mark.parametrize(
    ("mood", "error"),
    [("request", InputError("nothing suits me", "here", "change something")), ("failure", EngineError("tired"))],
)
def test_a_child_that_fails_raises_its_own_error_with_its_own_words(by, monkeypatch, capfd, mood, error):
    monkeypatch.setenv("TOY_MOOD", mood)
    with pytest.raises(PipelineError) as caught:
        by("process", "out", shards=3)
    assert (type(caught.value), str(caught.value)) == (type(error), str(error))
    assert "error:" not in capfd.readouterr().err, "who raises it tells it"


def test_what_a_child_says_is_passed_on(by, capfd):
    by("process", "out")
    assert "toy -> " in capfd.readouterr().err


@pytest.fixture
def instead(toy, documents, experiment_file, tmp_path):
    """Launches the toy with a shell script where its interpreter should be."""
    one = documents("one", "a")

    def launched(script, **changes):
        shell = tmp_path / "shell"
        shell.write_text(f"#!/bin/sh\n{script}\n")
        shell.chmod(0o755)
        experiment = Experiment.load(experiment_file, ["resources.launcher=process", f"resources.python.toy={shell}"])
        settings = toy.Settings.of(experiment, {"part": "a", **changes})
        return launch(toy.toy, tmp_path / "out", settings, (experiment, experiment_file), documents=one)

    return launched


@pytest.mark.parametrize(("code", "kind"), [(2, ExperimentError), (3, PipelineError)])
def test_a_child_that_ends_without_a_word_raises_an_error_with_the_command(instead, tmp_path, code, kind):
    with pytest.raises(PipelineError) as caught:
        instead(f"exit {code}", text="it's")
    assert type(caught.value) is kind
    assert (caught.value.what, caught.value.where) == (f"stage toy ended with exit code {code}", str(tmp_path / "out"))
    typed = shlex.split(caught.value.do.partition("try it alone: ")[2])
    assert subprocess.run([sys.executable, *typed[1:]], capture_output=True, check=False).returncode == 0
    assert Artifact.open(tmp_path / "out").table()["text"].to_pylist() == ["it's"] * 2


@pytest.mark.parametrize("script", ["kill -KILL $$", "exit 137"])
def test_a_child_that_was_killed_raises_an_error_that_says_what_to_lower(instead, script):
    with pytest.raises(
        PipelineError, match=r"(?s)killed by SIGKILL \(out of memory.*lower resources.micro_batch_tokens"
    ):
        instead(script)


def test_the_kernel_is_asked_whether_memory_was_the_reason(instead, tmp_path, monkeypatch):
    counter = tmp_path / "vmstat"
    counter.write_text("nr_free_pages 7\noom_kill 4\n")
    monkeypatch.setattr("pipeline.launch.OUT_OF_MEMORY", counter)
    with pytest.raises(PipelineError, match="the kernel killed processes for lack of memory meanwhile"):
        instead(f"echo oom_kill 5 > {counter}; kill -KILL $$")


def test_any_other_signal_is_named(instead):
    with pytest.raises(PipelineError, match=r"(?s)stage toy was killed by SIGSEGV.*run again"):
        instead("kill -SEGV $$")


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


STUBBORN = """
trap '' TERM
sleep 120 &
echo $! >> "$TOY_DIARY/sleepers"
setsid sleep 120 &
echo $! >> "$TOY_DIARY/sleepers"
echo $$ >> "$TOY_DIARY/sleepers"
wait
"""


class TimeIsUpError(BaseException):
    """As Prefect's signal of a cancellation: no `Exception`."""


@pytest.fixture
def sleepers(diary):
    """Waits for so many processes that note their id; whatever a test leaves of them is ended."""

    def pids(count):
        assert wait_until(lambda: len(diary("sleepers")) == count)
        return [int(pid) for pid in diary("sleepers")]

    yield pids
    for pid in alive([int(pid) for pid in diary("sleepers")]):
        os.kill(pid, signal.SIGKILL)


def test_whatever_is_raised_here_ends_also_what_will_not_end(instead, sleepers, monkeypatch):
    def give_up(*_):
        raise TimeIsUpError

    monkeypatch.setattr("pipeline.launch.GRACE", 1.0)
    before = signal.signal(signal.SIGALRM, give_up)
    watcher = threading.Thread(target=lambda: (sleepers(3), os.kill(os.getpid(), signal.SIGALRM)))
    watcher.start()
    try:
        with pytest.raises(TimeIsUpError):
            instead(STUBBORN)
    finally:
        signal.signal(signal.SIGALRM, before)
        watcher.join()
    assert wait_until(lambda: not alive(sleepers(3)))  # killed, and a busy machine takes its time


def test_what_a_child_leaves_behind_ends_with_it(instead, sleepers):
    with pytest.raises(PipelineError):
        instead('sleep 120 &\necho $! >> "$TOY_DIARY/sleepers"\nexit 3')
    assert wait_until(lambda: not alive(sleepers(1)))


def test_a_child_does_not_keep_our_output_open(toy, documents, experiment_file, sleepers, tmp_path):
    shell = tmp_path / "shell"
    shell.write_text(f"#!/bin/sh\n{STUBBORN}")
    shell.chmod(0o755)
    one = documents("one", "a")
    code = PARENT.replace(
        '["resources.launcher=process"]', f'["resources.launcher=process", "resources.python.toy={shell}"]'
    )
    words = [sys.executable, "-c", code, str(experiment_file), str(one), str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as parent:
        pids = sleepers(3)
        parent.kill()
        parent.communicate(timeout=5)  # ends when nobody has the pipe any more
    assert alive(pids), "they listen to nothing, so they are still there"
