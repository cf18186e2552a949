"""A stage as a task: what is tried again and when, time limits, and limits on hardware that a kill does not block."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.tasks import holding, perform
from pipeline.artifacts import Artifact
from pipeline.errors import EngineError, ExperimentError, GateError, GraderError, InputError, PipelineError
from pipeline.experiment import Resources
from stages.ingest import ingest
from stages.rollout import Settings, rollout


@pytest.fixture(scope="module")
def made(finished) -> Artifact:
    """Some artifact."""
    desk, _ = finished
    return Artifact.open(desk.folder / "runs/small-base/prompts")


@pytest.fixture
def done(served, made):
    """Does some work as a task under the server; returns what came of it, and how the task went."""

    def do(work, stage=ingest, **resources):
        @flow(name="doing")
        def doing():
            return perform(work, stage, Path("there"), Resources(**resources), name, name)

        name = f"work-{time.monotonic_ns()}"
        outcome: Artifact | PipelineError
        with temporary_settings({PREFECT_API_URL: served.url}):
            try:
                outcome = doing()
            except PipelineError as error:
                outcome = error
        return outcome, _recorded(served, name)

    return do


def _recorded(served, name):
    """The task of that name, and its states; the server takes them in a moment after they came about."""
    for _ in range(120):
        found = served.ask("task_runs/filter", {"task_runs": {"name": {"any_": [name]}}})
        if found and found[0]["state_type"] in ("COMPLETED", "FAILED", "CRASHED"):
            states = served.ask(f"task_run_states/?task_run_id={found[0]['id']}", method="GET")
            return found[0], sorted(states, key=lambda state: state["timestamp"])
        time.sleep(0.5)
    raise AssertionError(f"{name} is not recorded as ended")


@pytest.mark.parametrize("kind", [EngineError, GraderError])
def test_a_fault_of_engine_or_graders_is_tried_again_each_time_after_twice_the_wait(done, made, kind):
    at = []

    def faulty():
        at.append(time.monotonic())
        if len(at) < 4:
            raise kind("tired")
        return made

    outcome, (task, states) = done(faulty, retries=3, retry_seconds=0.4)
    assert outcome == made
    assert (task["state_type"], task["run_count"]) == ("COMPLETED", 4)
    waits = [after - before for before, after in pairwise(at)]
    assert [wait >= least for wait, least in zip(waits, (0.4, 0.8, 1.6), strict=True)] == [True] * 3
    assert waits[0] < waits[1] < waits[2]
    assert [state["name"] for state in states].count("AwaitingRetry") == 3


@pytest.mark.parametrize("error", [InputError("no such file"), GateError("stop"), PipelineError("broken")])
def test_what_will_not_go_better_is_not_tried_again(done, error):
    def refused():
        tries.append(1)
        raise error

    tries = []
    outcome, (task, _) = done(refused, retries=3, retry_seconds=0)
    assert (outcome, len(tries)) == (error, 1)
    assert (task["state_type"], task["run_count"]) == ("FAILED", 1)


def test_a_real_fault_of_an_engine_is_raised_when_all_tries_are_used_up(done, finished, tmp_path):
    desk, _ = finished
    policy = tmp_path / "policy"
    policy.mkdir()
    for file in (desk.folder / "runs/small-base/sft").iterdir():
        if file.is_file() and file.name != "manifest.json":
            (policy / file.name).write_bytes(file.read_bytes())
    (policy / "script.json").write_text('{"1,2,3": [[4]]}')
    settings = Settings(count=2, group_size=2, response_tokens=4, prompt_tokens=8, engine="scripted")
    prompts = desk.folder / "runs/small-base/prompts"
    outcome, (task, _) = done(
        lambda: rollout.run(tmp_path / "out", settings, prompts=prompts, policy=policy),
        rollout, retries=1, retry_seconds=0.1,
    )  # fmt: skip
    assert isinstance(outcome, EngineError)
    assert "the script has no line" in str(outcome)
    assert task["run_count"] == 2


def test_a_stage_that_takes_too_long_is_ended_and_not_tried_again(done):
    began = time.monotonic()
    outcome, (task, _) = done(lambda: time.sleep(60), timeouts={"ingest": 1.0, "label": 0.1}, retries=2)
    assert time.monotonic() - began < 30
    assert str(outcome).startswith(
        "stage ingest was ended after 1 s\n  where: there\n  next:  raise resources.timeouts."
    )
    assert (task["state_name"], task["run_count"]) == ("TimedOut", 1)


def test_a_limit_that_nobody_made_is_named_with_the_command_that_makes_it(served):
    with (
        temporary_settings({PREFECT_API_URL: served.url}),
        pytest.raises(ExperimentError, match="prefect gcl create tpu --limit 1"),
        holding("tpu"),
    ):
        pass


HOLDER = """
import sys, time
from flows.tasks import holding
with holding(sys.argv[1]):
    print("held", flush=True)
    time.sleep(120)
"""


def held_elsewhere(environment, limit):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, limit], env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_prefect_counts_who_holds_a_place(served, monkeypatch):
    monkeypatch.setenv("TMPDIR", served.environment["TMPDIR"])
    with temporary_settings({PREFECT_API_URL: served.url}):
        with holding("gpu"):
            assert served.ask("v2/concurrency_limits/gpu", method="GET")["active_slots"] == 1
        assert served.ask("v2/concurrency_limits/gpu", method="GET")["active_slots"] == 0


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An environment without a server."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return os.environ | {"TMPDIR": str(tmp_path)}


def lock_of(environment, limit):
    return Path(environment["TMPDIR"]) / f"rlhf-limits-{os.getuid()}" / f"{limit}-0"


def test_without_a_server_a_file_is_locked_and_a_kill_lets_go_of_it_at_once(alone):
    with held_elsewhere(alone, "gpu") as holder:
        with lock_of(alone, "gpu").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        holder.send_signal(signal.SIGKILL)
        began = time.monotonic()
        with holding("gpu"):
            assert time.monotonic() - began < 2
    with holding(None):
        assert {path.name for path in lock_of(alone, "gpu").parent.iterdir()} == {"gpu-0", "gpu-door"}


def test_a_limit_whose_name_is_no_file_name_is_locked_all_the_same(alone):
    with holding("a/../gpu of x"):
        assert lock_of(alone, "a%2F..%2Fgpu%20of%20x").exists()
