"""A fork shares what lies before it and makes the rest itself."""

import pytest

from flows.execute import walk
from flows.forking import fork
from flows.run import Run
from pipeline.catalog import artifacts_of
from pipeline.errors import ArtifactError, ExperimentError
from pipeline.experiment import Experiment


@pytest.fixture(scope="module")
def parent(recipes_folder, walked):
    return walked("dapo")


def run_of(file, parent, here_and_now) -> Run:
    return Run(Experiment.load(file), parent.root, here_and_now)


def test_a_fork_with_the_same_recipe_makes_the_same_bytes_from_there_on(parent, here_and_now):
    file = fork(parent.folder, 1, "same")
    run = run_of(file, parent, here_and_now)
    walk(run)
    made = {str(one.path.relative_to(run.folder)): one.manifest.digest for one in artifacts_of(run.folder)}
    theirs = {str(one.path.relative_to(parent.folder)): one.manifest.digest for one in artifacts_of(parent.folder)}
    assert made and made.items() <= theirs.items()
    assert {name.split("/")[0] for name in made if not name.startswith("eval")} == {"0001", "0002"}


def test_a_fork_under_another_recipe_starts_from_the_others_policy_and_keeps_its_reference(parent, here_and_now):
    file = fork(parent.folder, 2, "otherwise", "vapo")
    run = run_of(file, parent, here_and_now)
    outcome = walk(run)
    update = outcome.policy.manifest
    assert update.inputs["policy"][0].path == str(parent.iteration(1) / "policy")
    assert [path.name for path in sorted(run.folder.glob("0*"))] == ["0002"]
    assert (run.folder / "pretraining" / "critic").is_dir()


def test_a_fork_of_a_fork_goes_back_to_the_first(parent, here_and_now):
    middle = fork(parent.folder, 1, "middle", None, ("scale.learning_rate=2e-4",))
    walk(run_of(middle, parent, here_and_now))
    last = run_of(fork(middle.parent, 2, "last"), parent, here_and_now)
    outcome = walk(last)
    assert outcome.policy.manifest.inputs["policy"][0].path == str(middle.parent / "0001" / "policy")
    with pytest.raises(ExperimentError, match="begins with iteration 1"):
        fork(middle.parent, 0, "before")


@pytest.mark.parametrize(
    ("at", "name", "said"),
    [
        (9, "late", "beyond the 3 that the fork would have"),
        (1, "../out", "no plain name"),
        (1, "dapo", "there is a run called 'dapo' already"),
        (1, ".hidden", "no plain name"),
    ],
)
def test_a_fork_that_cannot_be_is_refused_before_anything_is_written(parent, at, name, said):
    there = sorted(parent.root.iterdir())
    with pytest.raises(ExperimentError, match=said):
        fork(parent.folder, at, name)
    assert sorted(parent.root.iterdir()) == there


def test_a_run_cannot_be_forked_where_it_has_not_come_to(parent, tmp_path):
    with pytest.raises(ArtifactError, match=r"has not come to iteration 4: .*0003/rollouts-0 is missing"):
        fork(parent.folder, 4, "ahead", None, ("scale.iterations=5",))
    with pytest.raises(ArtifactError, match="not a run"):
        fork(tmp_path, 0, "x")
