"""`rlhf diff`: what it prints of two artifacts and of two runs."""

import pytest

from flows.differing import diff
from flows.sheets import out
from pipeline.errors import ArtifactError


def printed(a, b, rows=3):
    with out.capture() as shown:
        before, out.width = out.width, 200
        try:
            diff(a, b, rows)
        finally:
            out.width = before
    return shown.get()


def test_two_labels_are_told_apart_by_settings_inputs_and_rows(walked):
    a, b = walked("grpo"), walked("dapo")
    shown = printed(a.iteration(0) / "labels-0", b.iteration(0) / "labels-0")
    assert "labels, other bytes" in shown
    assert "label.wrong" in shown and "common rows differ" in shown


def test_an_artifact_and_itself_do_not_differ(walked):
    path = walked("grpo").iteration(0) / "rollouts-0"
    assert "rollouts, the same bytes" in printed(path, path)


def test_two_checkpoints_are_told_apart_by_their_files(walked):
    run = walked("grpo")
    shown = printed(run.iteration(0) / "policy", run.iteration(1) / "policy")
    assert "model.safetensors" in shown and "config.json" not in shown


def test_two_runs_are_told_apart_by_experiment_artifacts_and_numbers(walked):
    a, b = walked("grpo"), walked("rloo")
    shown = printed(a.folder, b.folder)
    assert "recipe.advantage.kind" in shown and "leave_one_out" in shown
    assert "they part in" in shown and "loop, iteration 2" in shown and "labels reward/mean" in shown


def test_a_run_and_an_artifact_are_refused(walked):
    run = walked("grpo")
    with pytest.raises(ArtifactError, match="not a run"):
        diff(run.folder, run.iteration(0) / "policy", 3)
