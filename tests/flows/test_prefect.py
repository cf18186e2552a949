"""What Prefect knows of a run: its own server, asked through its API."""

import json
import time
import urllib.request
from pathlib import Path


def ask(server: str, place: str, **filters) -> list[dict]:
    request = urllib.request.Request(
        f"{server}/{place}/filter", json.dumps(filters).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def flow_run(server: str, experiment: Path) -> dict:
    """The only run of an experiment; other tests have theirs on the same server."""
    [run] = [run for run in ask(server, "flow_runs") if run["parameters"].get("experiment") == str(experiment)]
    return run


def recorded_tasks(server: str, run: dict, count: int) -> dict[str, dict]:
    """Task runs by name; the server takes them in as events, a moment after they end."""
    tasks: dict[str, dict] = {}
    for _ in range(60):
        tasks = {task["name"]: task for task in ask(server, "task_runs", flow_runs={"id": {"any_": [run["id"]]}})}
        if len(tasks) == count and all(task["state"]["type"] == "COMPLETED" for task in tasks.values()):
            return tasks
        time.sleep(0.5)
    raise AssertionError(f"{len(tasks)} of {count} task runs are recorded as completed: {sorted(tasks)}")


def links(server: str, run: dict) -> dict[str, dict]:
    """The links to datasets that a run has left, by key."""
    found = ask(server, "artifacts", artifacts={"flow_run_id": {"any_": [run["id"]]}})
    return {
        artifact["key"]: artifact
        for artifact in found
        if artifact["type"] == "markdown" and "file://" in str(artifact["data"])
    }


def test_a_run_is_a_flow_with_each_stage_a_task(finished, server):
    desk, _ = finished
    run = flow_run(server, desk.experiment)
    assert (run["name"], run["state"]["type"]) == ("small", "COMPLETED")
    tasks = recorded_tasks(server, run, len(links(server, run)))
    assert {"prompts", "sft", "eval/0000/rollouts", "0000/rollouts-0", "0001/policy", "eval/0002/labels"} <= set(tasks)
    assert tasks["0000/rollouts-0"]["total_run_time"] > 0


def test_each_task_links_to_its_artifact(finished, server):
    desk, _ = finished
    run = flow_run(server, desk.experiment)
    found = links(server, run)
    link = found["small-0000-labels-0"]
    assert (desk.folder / "runs/small/0000/labels-0").as_uri() in link["data"]
    assert "reward/mean" in link["description"]
    assert set(found) == {
        f"small-{name.replace('/', '-')}".replace("_", "-") for name in recorded_tasks(server, run, len(found))
    }


def test_each_iteration_is_shown_as_a_table_curves_and_samples(finished, server):
    desk, _ = finished
    run = flow_run(server, desk.experiment)
    keys = {artifact["key"] for artifact in ask(server, "artifacts", artifacts={"flow_run_id": {"any_": [run["id"]]}})}
    assert {"small-metrics", "small-curves", "small-samples"} <= keys
