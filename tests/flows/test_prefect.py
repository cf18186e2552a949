"""What Prefect knows of a run: its own server, asked through its API."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def ask(server: str, place: str, **filters) -> list[dict]:
    request = urllib.request.Request(
        f"{server}/{place}/filter", json.dumps(filters).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def recorded_tasks(server: str, count: int) -> dict[str, dict]:
    """Task runs by name; the server takes them in as events, a moment after they end."""
    for _ in range(60):
        tasks = {task["name"]: task for task in ask(server, "task_runs")}
        if len(tasks) == count and all(task["state"]["type"] == "COMPLETED" for task in tasks.values()):
            return tasks
        time.sleep(0.5)
    raise AssertionError(f"{len(tasks)} of {count} task runs are recorded as completed: {sorted(tasks)}")


def test_a_run_is_a_flow_with_each_stage_a_task(finished, server):
    desk, _ = finished
    runs = ask(server, "flow_runs")
    assert [(run["name"], run["state"]["type"], run["parameters"]["experiment"]) for run in runs] == [
        ("small", "COMPLETED", str(desk.experiment))
    ]
    tasks = recorded_tasks(server, len(ask(server, "artifacts")))
    assert {"prompts", "sft", "eval/0000/rollouts", "0000/rollouts-0", "0001/policy", "eval/0002/labels"} <= set(tasks)
    assert all(task["state"]["type"] == "COMPLETED" for task in tasks.values())
    assert tasks["0000/rollouts-0"]["total_run_time"] > 0


def test_each_task_links_to_its_artifact(finished, server):
    desk, _ = finished
    links = {artifact["key"]: artifact for artifact in ask(server, "artifacts")}
    link = links["small-0000-labels-0"]
    assert (desk.folder / "runs/small/0000/labels-0").as_uri() in link["data"]
    assert "reward/mean" in link["description"]
    assert set(links) == {
        f"small-{name.replace('/', '-')}".replace("_", "-") for name in recorded_tasks(server, len(links))
    }


def test_the_deployment_is_accepted(server, prefect_home):
    environment = os.environ | {"PREFECT_API_URL": server}
    for words in (
        ["work-pool", "create", "rlhf", "--type", "process"],
        ["--no-prompt", "deploy", "--prefect-file", "flows/prefect.yaml", "--all"],
    ):
        subprocess.run(
            [sys.executable, "-m", "prefect", *words], cwd=ROOT, env=environment, check=True, capture_output=True
        )
    deployed = ask(server, "deployments")
    assert [(d["name"], d["work_pool_name"], d["schedules"][0]["schedule"]["cron"]) for d in deployed] == [
        ("nightly", "rlhf", "0 2 * * *")
    ]
