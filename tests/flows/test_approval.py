"""A person's word in Prefect: the run pauses under a real server, and goes on as the form says."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

PAUSING = """
import sys
from pathlib import Path
from types import SimpleNamespace
from prefect import flow
from flows.approval import asked
from flows.promotion import Comparison
from pipeline.experiment import Promotion

plan = Promotion(approval=True, approval_seconds=float(sys.argv[1]))
run = SimpleNamespace(experiment=SimpleNamespace(promotion=plan), say=lambda line: print(line, flush=True))
one = SimpleNamespace(iteration=12)
comparison = Comparison(one, SimpleNamespace(iteration=0), 0.2, 0.1, 0.3, 60, ())

@flow(name="asks")
def asks() -> str:
    return asked(run)(comparison)

print("word:", asks() if sys.argv[2] == "flow" else asked(run)(comparison), flush=True)
"""


def call(server: str, path: str, body: object) -> object:
    request = urllib.request.Request(f"{server}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read() or "null")


def asking(server: str | None, seconds: int, where: str = "flow") -> subprocess.Popen[str]:
    environment = os.environ | ({"PREFECT_API_URL": server} if server else {})
    return subprocess.Popen(
        [sys.executable, "-c", PAUSING, str(seconds), where], env=environment, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


def resumed(server: str, form: dict[str, bool]) -> None:
    """Answers as soon as Prefect takes an answer: a run is paused a moment before its form is there."""
    run = paused(server)
    for _ in range(40):
        answer = call(server, f"/flow_runs/{run['id']}/resume", {"run_input": form})
        if answer["status"] == "ACCEPT":
            return
        assert answer["details"]["reason"] == "Run input schema not found.", answer
        time.sleep(0.25)
    raise TimeoutError("the form never came")


def paused(server: str) -> dict[str, object]:
    wanted = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}, "flows": {"name": {"any_": ["asks"]}}}
    for _ in range(240):
        if found := call(server, "/flow_runs/filter", wanted):
            return found[0]
        time.sleep(0.25)
    raise TimeoutError("no run paused")


@pytest.mark.parametrize(("form", "word"), [({"promote": True}, "yes"), ({"promote": False}, "no")])
def test_a_paused_run_goes_on_as_the_form_says(server, form, word):
    with asking(server, 120) as process:
        try:
            resumed(server, form)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "the run pauses for a person's word" in said and f"word: {word}" in said


def test_without_an_answer_the_policy_waits(server):
    said, _ = asking(server, 3).communicate(timeout=90)
    assert "word: later" in said


def test_without_a_server_that_stays_nobody_is_asked():
    said, _ = asking(None, 120, "outside").communicate(timeout=90)
    assert said.strip() == "word: later"
