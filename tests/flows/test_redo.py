"""One stage of a run again: beside the old with changes, in its place without; weights pruned and made again."""

import shutil

import pytest

from flows.execute import walk
from flows.prune import prune
from flows.redo import redo, refresh
from flows.run import Run, look_up
from flows.status import status
from flows.verifying import verified
from pipeline.artifacts import PRUNED, Artifact
from pipeline.catalog import EXPERIMENT_FILE, REPLACED, artifacts_of
from pipeline.errors import ArtifactError, BusyError, ExperimentError, PipelineError
from pipeline.experiment import Experiment
from pipeline.locks import held


@pytest.fixture(scope="module")
def sources(tmp_path_factory, desk, here_and_now):
    """A finished run on paths that start at the working directory, as people's do."""
    root = tmp_path_factory.mktemp("redo")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(root)
        run = Run(Experiment.load(desk.experiment, ("scale.iterations=4",), name="x"), root / "runs", here_and_now)
        run.folder.mkdir(parents=True)
        run.write_experiment()
        relative = Run(run.experiment, (root / "runs").relative_to(root), here_and_now)
        walk(relative)
    return root


@pytest.fixture
def folder(tmp_path, sources, monkeypatch):
    """A copy of it, in the working directory."""
    shutil.copytree(sources / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return (tmp_path / "runs" / "x").relative_to(tmp_path)


def states(folder):
    return {row[0]: row[1] for row in status(folder, every=True)[1].rows}


def digests(folder):
    return {str(one.path): one.manifest.digest for one in artifacts_of(folder)}


def test_with_changes_a_stage_is_done_again_beside_the_old_and_what_came_after_is_stale(folder):
    before, said = digests(folder), []
    made = redo(folder, "label", 1, ("label.wrong=-2.0",), "harsh", said.append)
    assert [one.path.name for one in made] == [f"labels-{turn}.harsh" for turn in range(len(made))] and made
    new, old = made[0].table(), Artifact.open(folder / "0001" / "labels-0").table()
    assert min(new["reward"].to_pylist()) == -2 and min(old["reward"].to_pylist()) == -1
    assert digests(folder) == before
    found = states(folder)
    assert found["0001/advantages"] == "stale (labels-0 was redone as labels-0.harsh)"
    assert found["0001/labels-0.harsh"] == "redone" and found["0003/policy"].startswith("stale")
    assert any("rlhf fork" in line for line in said) and any("0001/advantages" in line for line in said)
    again = redo(folder, "labels-0", 1, ("label.wrong=-3.0",), None, said.append)
    assert again[0].path.name == "labels-0.redo-1"
    walk(Run(Experiment.load(folder / EXPERIMENT_FILE), folder.parent, look_up))  # goes by its own, all there
    assert refresh(folder, said.append) == [] and digests(folder) == before  # nothing of it has other bytes


def test_without_changes_a_damaged_artifact_is_made_again_with_the_same_bytes(folder):
    before, said = digests(folder), []
    part = next((folder / "0002" / "rollouts-0").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-3])
    [made] = redo(folder, "0002/rollouts-0", None, (), None, said.append)
    assert digests(folder) == before and made.faults() == []
    assert [path.name.rpartition("-")[0] for path in (folder / REPLACED / "0002").iterdir()] == ["rollouts-0"]
    assert "with the same bytes" in said[-1] and set(states(folder).values()) == {"done"}


def test_what_is_replaced_with_other_bytes_makes_what_came_after_anew_by_one_command(folder, tmp_path):
    labels = folder / "0001" / "labels-0"
    lenient = redo(folder, "labels-0", 1, ("label.wrong=-0.5",), "lenient", print)[0]
    shutil.rmtree(labels)
    lenient.path.rename(labels)  # by hand, as nobody should
    run = Run(Experiment.load(folder / EXPERIMENT_FILE), folder.parent, look_up)
    with pytest.raises(ArtifactError, match="made by a different computation"):
        walk(run)
    sampling = folder / "0001" / "policy"
    old, said = Artifact.open(sampling).manifest.digest, []
    made = refresh(folder, said.append)
    assert labels in [one.path for one in made] and "made again: 0001/labels-0" in said
    assert Artifact.open(sampling).manifest.digest == old
    walk(run)
    assert set(states(folder).values()) == {"done"} and refresh(folder, said.append) == []


def test_after_a_redo_of_the_foundations_everything_is_stale_until_it_is_made_again(folder):
    sft = folder.parent / "small-base" / "sft"
    manifest = (sft / "manifest.json").read_text()
    config = (sft / "generation_config.json").read_text()
    (sft / "generation_config.json").write_text(config + "\n")
    digest = Artifact.open(sft).manifest.digest
    (sft / "manifest.json").write_text(manifest.replace(digest, "1" * 64))
    assert states(folder)["0000/rollouts-0"].startswith("stale")
    said: list[str] = []
    redo(folder, "sft", None, (), None, said.append)
    assert "with other bytes" in said[0] and digest == Artifact.open(sft).manifest.digest
    assert set(states(folder).values()) == {"done"}


def test_an_error_on_the_way_puts_the_old_one_back(folder):
    policy = folder / "0000" / "policy"
    (policy / PRUNED).touch()
    before = digests(folder)
    with pytest.raises(ArtifactError, match="pruned"):
        redo(folder, "0001/scores", None, (), None, print)
    assert digests(folder) == before and states(folder)["0001/scores"] == "done"


@pytest.mark.parametrize(
    ("what", "iteration", "changes", "name", "said"),
    [
        ("labels-7", 1, (), None, "no artifact '0001/labels-7'"),
        ("label", 9, (), None, r"stage label made nothing in iteration 9"),
        ("label", None, (), None, "made nothing in the foundations"),
        ("label", 1, ("label.rwong=1",), None, "rwong"),
        ("label", 1, ("grader_seconds=-1",), None, "grader_seconds"),
        ("label", 1, ("nonsense=1",), None, "nonsense"),
        ("label", 1, (), "../../out", "no plain name"),
        ("../../etc", 1, (), None, "no artifact"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_touched(folder, what, iteration, changes, name, said):
    before = sorted(path for path in folder.rglob("*") if path.name != ".lock")
    with pytest.raises(ExperimentError, match=said) as caught:
        redo(folder, what, iteration, changes, name, print)
    assert caught.value.exit_code == 2
    assert sorted(path for path in folder.rglob("*") if path.name != ".lock") == before


def test_a_run_at_work_is_neither_redone_nor_pruned(folder):
    with held(folder / ".lock", "the run x"):
        for attempt in (
            lambda: redo(folder, "label", 1, (), None, print),
            lambda: prune(folder),
            lambda: refresh(folder, print),
        ):
            with pytest.raises(BusyError, match="is at the run x"):
                attempt()


def test_pruning_frees_old_weights_and_the_run_is_still_complete(folder):
    weights = {path.parent.parent.name for path in folder.glob("0*/policy/model.safetensors")}
    assert weights == {"0000", "0001", "0002", "0003"}
    planned = prune(folder, 1, dry_run=True)
    assert {path.parent.parent.name for path in folder.glob("0*/policy/model.safetensors")} == weights
    freed = prune(folder, 1)
    assert [(one.artifact, one.bytes) for one in freed] == [(one.artifact, one.bytes) for one in planned]
    gone = {one.artifact.path.parent.name for one in freed}
    assert gone and "0003" not in gone and not list(folder.glob("0000/policy/trainer/*.safetensors"))
    assert {name for name, state in states(folder).items() if state == "pruned"} == {f"{n}/policy" for n in gone}
    walk(Run(Experiment.load(folder / EXPERIMENT_FILE), folder.parent, look_up))
    assert not [one for one in verified(folder) if one.faults]
    assert prune(folder, 1) == []
    before = Artifact.open(folder / "0000" / "policy").manifest.digest
    [made] = redo(folder, "0000/policy", None, (), None, print)
    assert made.manifest.digest == before and not made.pruned


def test_what_others_go_by_is_never_pruned(folder):
    (folder / "promoted").symlink_to("0001/policy")
    fork = folder.with_name("y")
    fork.mkdir()
    text = (folder / EXPERIMENT_FILE).read_text().replace('name = "x"', 'name = "y"')
    (fork / EXPERIMENT_FILE).write_text(text + '\n[fork]\nrun = "x"\nat = 1\n')
    freed = prune(folder, 1)
    kept = {"0000", "0001", "0003"}
    assert not {one.artifact.path.parent.name for one in freed} & kept
    with pytest.raises(PipelineError, match="--keep 0"):
        prune(folder, 0)


def test_a_redo_or_a_prune_that_was_killed_half_way_is_finished_by_the_next(folder, here_and_now):
    before = digests(folder)
    (folder / REPLACED / "0001").mkdir(parents=True)
    (folder / "0001" / "scores").rename(folder / REPLACED / "0001" / "scores-killed")
    walk(Run(Experiment.load(folder / EXPERIMENT_FILE), folder.parent, here_and_now))
    assert digests(folder) == before
    (folder / "0000" / "policy" / PRUNED).touch()
    assert "0000" in {one.artifact.path.parent.name for one in prune(folder, 1) if one.artifact}
    assert not (folder / "0000" / "policy" / "model.safetensors").exists() and not (folder / REPLACED).exists()
