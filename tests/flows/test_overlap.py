"""Sampling that overlaps with the update: a step off-policy, told per row, corrected for, the same wherever it runs."""

import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pyarrow.parquet as pq
import pytest

from flows.execute import walk
from flows.run import Run
from pipeline.artifacts import METRICS_FILE, Artifact, Manifest
from pipeline.catalog import artifacts_of
from pipeline.errors import ExperimentError, PipelineError
from pipeline.experiment import Experiment
from pipeline.launch import launch, meanwhile
from stages.rollout import rollout

ON = (
    "scale.overlap=true", "recipe_changes.grpo.importance={kind='token_truncated'}", "data.held_out=",
    "scale.iterations=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def overlapped(tmp_path_factory, desk, here_and_now):
    """A run that overlaps, in this process: one stage after the other."""
    run = Run(Experiment.load(desk.experiment, ON, "grpo"), tmp_path_factory.mktemp("overlap") / "inline", here_and_now)
    run.folder.mkdir(parents=True)
    walk(run)
    return run


def test_the_first_round_comes_from_the_policy_before_the_last_update_and_its_rows_say_so(overlapped):
    policies = [overlapped.base / "sft", *(overlapped.iteration(number) / "policy" for number in range(3))]
    for number, (sampler, staleness) in enumerate([(0, 0), (0, 1), (1, 1)]):
        rollouts = Manifest.read(overlapped.iteration(number) / "rollouts-0")
        assert rollouts.inputs["policy"][0].digest == Manifest.read(policies[sampler]).digest
        for kind in ("scores", "policy"):
            read = Manifest.read(overlapped.iteration(number) / kind).inputs["policy"][0]
            assert read.digest == Manifest.read(policies[number]).digest
        rows = Artifact.open(overlapped.iteration(number) / "rollouts-0")
        assert rows.table(["staleness"])["staleness"].unique().to_pylist() == [staleness]


def test_what_is_old_is_weighed_by_how_likely_it_is_now(overlapped):
    apart, weights = [], []
    for number in range(3):
        here = overlapped.iteration(number)
        apart.append(Artifact.open(here / "scores").stats["kl/sampler_abs"])
        numbers = pq.read_table(here / "advantages" / METRICS_FILE).to_pylist()
        weights.append(next(row["value"] for row in numbers if row["name"] == "importance/mean"))
    assert apart[0] < 1e-5 and min(apart[1:]) > 1e-4, "the policies are apart by an update"
    assert abs(weights[0] - 1) < 1e-5 and min(abs(weight - 1) for weight in weights[1:]) > 1e-5


def test_in_processes_it_is_the_same_and_sampled_while_the_policy_is_updated(overlapped, desk, tmp_path):
    shutil.copytree(overlapped.base, tmp_path / overlapped.base.name)
    changes, together = (*ON, "resources.launcher=process"), set()
    words = ["run", str(desk.experiment), "--recipe", "grpo", "--root", str(tmp_path)]
    words += [word for change in changes for word in ("--set", change)]
    with ThreadPoolExecutor(1) as beside:
        done = beside.submit(desk.rlhf, *words)
        while not done.done():
            together.add(frozenset(made_now(tmp_path / "small")))
            time.sleep(0.05)
        done.result()
    for one in artifacts_of(overlapped.folder):
        there = Manifest.read(tmp_path / one.path.relative_to(overlapped.root))
        assert there.digest == one.manifest.digest, one.path
    for number in (1, 2):
        assert {f"{number:04d}/rollouts-0", f"{number - 1:04d}/policy"} in together
    not_alone = {place for places in together if len(places) > 1 for place in places}
    assert not [place for place in not_alone if place.endswith("/scores")]


def made_now(folder):
    """What stages in processes of their own are at."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = child.cmdline()
            if "--out" in words and words[-1].startswith(str(folder)):
                yield words[-1].removeprefix(f"{folder}/")


def test_on_a_cluster_whose_workers_are_others_for_sampling_and_reading_it_is_the_same(overlapped, desk, tmp_path):
    """Workers of one demand end those of another: whoever samples beside the update is not to meet who reads."""
    shutil.copytree(overlapped.base, tmp_path / overlapped.base.name)
    crews = [f"resources.ray.demands.{stage}.workers={n}" for stage, n in (("rollout", 1), ("label", 1), ("score", 2))]
    changes = (*ON, "scale.iterations=2", "resources.launcher=ray", *crews)
    desk.rlhf(
        "run", str(desk.experiment), "--recipe", "grpo", "--root", str(tmp_path),
        *(word for change in changes for word in ("--set", change)),
    )  # fmt: skip
    made = artifacts_of(tmp_path / "small")
    assert {"0000/scores", "0000/policy", "0001/rollouts-0", "0001/policy"} <= {
        one.path.relative_to(tmp_path / "small").as_posix() for one in made
    }
    for one in made:
        there = Manifest.read(overlapped.root / one.path.relative_to(tmp_path))
        assert there.digest == one.manifest.digest, one.path


def test_off_it_is_not_there(desk, tmp_path, here_and_now):
    run = Run(Experiment.load(desk.experiment, ON[1:], "grpo"), tmp_path, here_and_now)
    run.folder.mkdir(parents=True)
    walk(run)
    for one in artifacts_of(run.folder):
        if one.contract.name == "rollouts":
            assert "staleness" not in one.table().column_names
            assert one.manifest.inputs["policy"][0].path.endswith("sft" if "0000" in str(one.path) else "policy")


def test_it_needs_a_correction(desk):
    with pytest.raises(ExperimentError, match=r"an update old.*recipe_changes\.grpo\.importance"):
        Experiment.load(desk.experiment, ("scale.overlap=true",), "grpo")


def test_where_the_update_fails_the_sampling_beside_it_is_ended(overlapped, tmp_path):
    """A process that would sample for long."""
    asleep = tmp_path / "asleep"
    asleep.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    asleep.chmod(0o755)
    experiment = overlapped.experiment.model_copy(
        update={"resources": overlapped.experiment.resources.model_copy(
            update={"launcher": "process", "python": {"rollout": str(asleep)}}
        )}
    )  # fmt: skip
    settings = rollout.settings_type.of(experiment, {"count": 2})
    given = {"prompts": overlapped.base / "prompts", "policy": overlapped.base / "sft"}

    def sample():
        launch(rollout, tmp_path / "out", settings, (experiment, tmp_path / "experiment.toml"), **given)

    before, began = {one.pid for one in psutil.Process().children(recursive=True)}, time.monotonic()
    with pytest.raises(ZeroDivisionError), meanwhile(sample):
        while {one.pid for one in psutil.Process().children(recursive=True)} <= before:
            time.sleep(0.01)
        raise ZeroDivisionError
    assert time.monotonic() - began < 60
    assert {one.pid for one in psutil.Process().children(recursive=True)} <= before


def test_what_fails_beside_the_update_is_raised_after_it():
    def fail():
        raise PipelineError("no tokens")

    done = []
    with pytest.raises(PipelineError, match="no tokens"), meanwhile(fail):
        done.append("updated")
    assert done == ["updated"]
