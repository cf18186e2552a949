"""`rlhf serve` on this machine: a real server and a real process worker, schedules that fire, processes that die."""

import subprocess
import sys
import time
from itertools import pairwise

import psutil
import pytest

from flows.tables import STAGES, load_stage
from pipeline.artifacts import Artifact
from pipeline.catalog import artifacts_of
from pipeline.storage import MANIFEST

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def wait_until(true, seconds=180.0):
    end = time.monotonic() + seconds
    while not (said := true()) and time.monotonic() < end:
        time.sleep(0.5)
    return said


def alive(processes):
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def working_on(stage, name):
    """The process that makes an artifact of that run."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"stages.{stage}" in words and any(name in word for word in words):
            return process
    return None


def test_a_schedule_starts_runs_by_itself_until_it_is_paused(served):
    def completed():
        return [run for run in served.runs(schedule) if run["state_type"] == "COMPLETED"]

    with served.every(10, "run", experiment="small.toml", name="scheduled") as schedule:
        assert wait_until(lambda: len(completed()) >= 2)
    assert (served.folder / "runs/scheduled/eval/0002/labels" / MANIFEST).exists(), "where `rlhf serve` was typed"
    assert {run["name"] for run in completed()} == {"scheduled"}
    ran = len(served.runs(schedule))
    time.sleep(12)
    assert len(served.runs(schedule)) == ran


def test_cancelling_ends_the_processes_of_a_stage_within_ten_seconds(served):
    changes = ["resources.launcher=process", "sft.epochs=100000", "base=endless-base"]
    flow_run = served.start("run", experiment="small.toml", name="endless", changes=changes)
    stage = wait_until(lambda: working_on("sft", "endless-base"))
    assert stage, served.state(flow_run)
    wait_until(lambda: list((served.folder / "runs/endless-base").glob(".part-sft*")))
    family = [stage.parent(), stage, *stage.children(recursive=True)]
    began = time.monotonic()
    served.ask(f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_until(lambda: not alive(family), 30)
    assert time.monotonic() - began < 10
    assert not alive(family)
    assert wait_until(lambda: served.state(flow_run) in ENDED)
    assert served.state(flow_run) == "CANCELLED"
    assert not (served.folder / "runs/endless-base/sft").exists()


def test_a_worker_that_was_killed_is_replaced_and_the_next_schedule_ends_its_run(served):
    run = served.folder / "runs/killed"
    parameters = {"experiment": "small.toml", "name": "killed", "changes": ["scale.iterations=12", "base=killed-base"]}
    with served.every(15, "run", **parameters) as schedule:
        assert wait_until((run / "0001/policy" / MANIFEST).exists)
        before, worker = (run / "0000/policy" / MANIFEST).stat(), served.worker()
        family = worker.children(recursive=True)
        worker.kill()
        assert wait_until(lambda: not alive(family), 30), "what it had started goes with it"
        assert wait_until(lambda: any("worker" in child.cmdline() for child in served.serve.children()))
        assert served.worker() != worker
        assert not (run / "eval/0012").exists(), "the run was not at its end"
        assert wait_until(lambda: any(one["state_type"] == "COMPLETED" for one in served.runs(schedule)))
    assert (run / "eval/0012/labels" / MANIFEST).exists()
    after = (run / "0000/policy" / MANIFEST).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "nothing was made twice"
    assert served.runs(schedule)[0]["state_type"] == "CRASHED"
    assert not list(run.rglob(".part-*"))


HOLD = """
import sys
from flows.tasks import holding
with holding(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_that_want_the_gpu_take_turns(served):
    def rlhf(name):
        changes = ("--set", "resources.limits.gpu=gpu", "--set", f"base={name}-base", "--set", "scale.iterations=2")
        words = [sys.executable, "-m", "flows.cli", "run", "small.toml", "--name", name, *changes]
        return subprocess.Popen(words, cwd=served.folder, env=served.environment, stderr=subprocess.DEVNULL)

    words = [sys.executable, "-c", HOLD, "gpu"]
    with subprocess.Popen(words, env=served.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with rlhf("left") as left, rlhf("right") as right:
            last = [served.folder / f"runs/{name}-base/demonstrations" / MANIFEST for name in ("left", "right")]
            assert wait_until(lambda: all(path.exists() for path in last)), "what wants no GPU is done"
            holder.stdin.close()
            assert (left.wait(240), right.wait(240)) == (0, 0)
    flow_runs = {run["id"]: run["name"] for run in served.ask("flow_runs/filter") if run["name"] in ("left", "right")}
    assert len(flow_runs) == 2
    on_gpu = {name for name in STAGES if load_stage(name).hardware == "gpu"}

    def turns():
        tasks = served.ask("task_runs/filter", {"flow_runs": {"id": {"any_": list(flow_runs)}}, "limit": 200})
        done = [task for task in tasks if task["end_time"] and task["start_time"]]
        names = {name: [a for part in (name, f"{name}-base") for a in artifacts_of(served.folder / "runs" / part)]
                 for name in flow_runs.values()}  # fmt: skip
        if len(done) < sum(map(len, names.values())):
            return None
        stages = {(name, a.path.name): a.manifest.stage for name, found in names.items() for a in found}
        return sorted(
            (task["start_time"], task["end_time"], name)
            for task in done
            if stages[name := flow_runs[task["flow_run_id"]], task["name"].rpartition("/")[2]] in on_gpu
        )

    found = wait_until(turns)
    assert len(found) > 10
    for (_, end, _), (start, _, _) in pairwise(found):
        assert end <= start
    order = [name for _, _, name in found]
    assert sum(one != other for one, other in pairwise(order)) > len(order) / 2, "who comes back waits behind the other"


def test_any_stage_can_be_run_from_a_form(served, finished):
    desk, _ = finished
    here = desk.folder / "runs/small"
    rollouts, prompts = str(here / "0000/rollouts-0"), str(desk.folder / "runs/small-base/prompts")
    inputs = {"rollouts": rollouts, "prompts": prompts}
    flow_run = served.start(
        "stage", name="label", inputs=inputs, out="alone/labels", settings={"room": 1}, experiment="small.toml"
    )
    assert wait_until(lambda: served.state(flow_run) in ENDED)
    assert served.state(flow_run) == "COMPLETED"
    made = Artifact.open(served.folder / "alone/labels")
    assert made.manifest.settings["room"] == 1
    assert made.manifest.inputs["rollouts"][0].digest == Artifact.open(here / "0000/rollouts-0").manifest.digest
    assert served.ask("artifacts/filter", {"artifacts": {"key": {"any_": ["alone-labels"]}}})


def test_a_form_refuses_a_stage_that_does_not_exist(served):
    with pytest.raises(OSError, match=r"409|422"):
        served.start("stage", name="lable", inputs={}, out="alone/nothing")


def test_one_more_iteration_and_an_evaluation_of_its_policy(served):
    subprocess.run(
        [sys.executable, "-c", MAKE_ONE], cwd=served.folder, env=served.environment, check=True, capture_output=True
    )
    run = served.folder / "runs/steps"
    assert (run / "0000/policy").exists() and not (run / "0001").exists()
    flow_run = served.start("iteration", run="runs/steps")
    assert wait_until(lambda: served.state(flow_run) in ENDED)
    assert (run / "0001/policy").exists() and not (run / "0002").exists()
    flow_run = served.start("evaluate", run="runs/steps", iteration=1)
    assert wait_until(lambda: served.state(flow_run) in ENDED)
    assert served.state(flow_run) == "COMPLETED"
    assert (run / "eval/0001/labels" / MANIFEST).exists()


MAKE_ONE = """
from flows.execute import run_experiment
run_experiment("small.toml", name="steps", changes=["scale.iterations=4", "base=steps-base"], at_most=1)
"""

SHOW = """
import sys
from pathlib import Path
from prefect import flow
from flows.pictures import show, wait
from flows.run import Run, look_up
from pipeline.experiment import Experiment

@flow
def showing():
    run = Path(sys.argv[1])
    show(Run(Experiment.load(run / "experiment.toml"), run.parent, look_up), 1)
    wait()

showing()
"""


def test_the_pages_draw_the_form_the_curves_and_the_samples(served, finished, browser):
    desk, _ = finished
    subprocess.run(
        [sys.executable, "-c", SHOW, "runs/small"], cwd=desk.folder, env=served.environment, check=True,
        capture_output=True,
    )  # fmt: skip
    latest = {artifact["key"]: artifact["latest_id"] for artifact in served.ask("artifacts/latest/filter")}
    page = browser.new_page()
    pages = served.url.removesuffix("/api")
    page.goto(f"{pages}/artifacts/artifact/{latest['small-curves']}")
    drawn = page.locator('img[src^="data:image/svg+xml"]')
    drawn.wait_for()
    assert drawn.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300
    page.goto(f"{pages}/artifacts/artifact/{latest['small-samples']}")
    page.get_by_role("cell", name="best").first.wait_for()
    page.goto(f"{pages}/artifacts/artifact/{latest['small-metrics']}")
    page.get_by_text("accuracy").first.wait_for()
    page.goto(f"{pages}/deployments/deployment/{served.deployment('stage')['id']}/run")
    page.get_by_text("Which stage.").wait_for()
    page.locator(".p-select-button__control").press("ArrowDown")
    page.locator(".p-select-option__text").first.wait_for()
    assert page.locator(".p-select-option__text").all_inner_texts() == list(STAGES)
    page.close()


def test_deploying_again_changes_nothing_and_without_a_server_says_what_to_type(served, tmp_path):
    def rlhf(environment):
        words = [sys.executable, "-m", "flows.cli", "deploy"]
        return subprocess.run(words, cwd=served.folder, env=environment, capture_output=True, text=True, check=False)

    def known():
        limit = served.ask("v2/concurrency_limits/gpu", method="GET")
        names = sorted(deployment["name"] for deployment in served.ask("deployments/filter"))
        automations = [automation["name"] for automation in served.ask("automations/filter")]
        return names, limit["limit"], automations

    before = known()
    assert before == (["evaluate", "iteration", "run", "stage"], 1, ["rlhf: runs that fell silent are dead"])
    done = rlhf(served.environment)
    assert (done.returncode, known()) == (0, before), done.stderr
    nowhere = rlhf(served.environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert nowhere.returncode == 2
    assert "rlhf serve" in nowhere.stderr and "Traceback" not in nowhere.stderr
