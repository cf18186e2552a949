"""Event files: where they are wanted, a run writes them as it goes, under the names that were asked for."""

import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flows.execute import settle_again
from flows.run import Run
from pipeline.artifacts import Artifact
from pipeline.experiment import Experiment


@pytest.fixture
def again(walked, tmp_path):
    """Settle a copy of a finished run with changes to its experiment; returns its directory."""
    shutil.copytree(walked("grpo").root, tmp_path / "runs")

    def settle(*changes):
        experiment = Experiment.load(tmp_path / "runs/grpo/experiment.toml", changes)
        run = Run(experiment, tmp_path / "runs", walked("grpo").perform)
        settle_again(run)
        return run.folder

    return settle


def tags(folder):
    found = EventAccumulator(str(folder / "tensorboard/loop"))
    found.Reload()
    return {
        tag: [event.tensor_proto.float_val[0] for event in found.Tensors(tag)] for tag in found.Tags()["tensors"]
    }, {tag: [event.value for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def rewards(folder):
    return [Artifact.open(folder / f"{number:04d}/labels-0").stats["reward/mean"] for number in range(3)]


def test_without_the_setting_there_are_none(again):
    assert not (again() / "tensorboard").exists()


@pytest.mark.parametrize(("names", "tag"), [("house", "reward/mean"), ("trl", "reward")])
def test_with_it_every_iteration_is_there_under_the_names_that_were_asked_for(again, names, tag):
    folder = again("tracking.tensorboard=true", f"tracking.names={names}")
    tensors, scalars = tags(folder)
    assert (scalars | tensors)[tag] == pytest.approx(rewards(folder))
