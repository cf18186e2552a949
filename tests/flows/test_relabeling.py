"""Stored rollouts labelled again: beside the old labels, with the difference shown, and the run as it was."""

import shutil

import pytest

from flows.compare import compare, stored
from flows.relabeling import relabel
from flows.sheets import out
from flows.status import status
from pipeline.artifacts import Artifact
from pipeline.catalog import EXPERIMENT_FILE, artifacts_of, catalog, gather_metrics
from pipeline.errors import ArtifactError, ExperimentError, InputError
from pipeline.experiment import Experiment
from pipeline.grading import judge


@pytest.fixture
def folder(walked, tmp_path):
    run = walked("dapo")
    shutil.copytree(run.root, tmp_path / "runs")
    return tmp_path / "runs" / run.folder.name


def labelled(folder, name, turn=0):
    return Artifact.open(folder / "relabeled" / name / "0000" / f"labels-{turn}")


def again(folder, name, label=None, grader=None, recipe=None, changes=()):
    said = []
    with out.capture() as shown:
        relabel(folder, 0, name, label, grader, recipe, changes, said.append)
    return shown.get(), "\n".join(said)


def rewards(artifact):
    rows = artifact.table().to_pylist()
    return {(row["prompt_id"], row["sample"]): row["reward"] for row in rows}


def test_another_setting_gives_other_rewards_and_the_difference_is_shown(folder):
    shown, said = again(folder, "harsh", changes=["label.wrong=-3.0"])
    old = rewards(Artifact.open(folder / "0000" / "labels-0"))
    assert rewards(labelled(folder, "harsh")) == {key: -3.0 if value < 0 else value for key, value in old.items()}
    wrong = sum(value < 0 for value in old.values())
    assert f"{wrong} of {len(old)} common rows differ" in shown
    assert "reward: -1 -> -3" in shown
    assert "rows train" in said and "rlhf diff" in said


def test_another_labeler_takes_its_own_settings(folder):
    again(folder, "votes", label="majority_vote")
    made = labelled(folder, "votes")
    assert made.manifest.settings["label"]["kind"] == "majority_vote"
    shares = made.table()["vote_share"].to_pylist()
    assert None not in shares and set(rewards(made).values()) <= {0.0, 1.0}


def test_another_grader_takes_the_place_of_the_prompts_own(folder):
    again(folder, "graded", grader="math")
    made = labelled(folder, "graded")
    source = stored(folder, 0)
    answers = {row["prompt_id"]: row["answer"] for row in Artifact.open(source.prompts).table().to_pylist()}
    rows = source.rollouts[0].table().to_pylist()
    references = [answers[row["prompt_id"].partition("#")[0]] for row in rows]
    found = judge("math", [row["response"] for row in rows], references, workers=1)
    right = {(row["prompt_id"], row["sample"]): one.correct for row, one in zip(rows, found, strict=True)}
    assert rewards(made) == {key: 1.0 if one else -1.0 for key, one in right.items()}


def test_another_recipe_gives_its_labeler_and_its_filters(folder):
    again(folder, "others", recipe="rloo", label="verifier")
    assert labelled(folder, "others").manifest.settings["filter"] == []
    assert labelled(folder, "others").table()["keep"].to_pylist().count(False) == 0


def test_the_run_is_as_it_was_and_nothing_of_it_is_stale(folder):
    before = {one.path: one.manifest.digest for one in artifacts_of(folder)}
    numbers, told = gather_metrics(folder).num_rows, status(folder, every=True)[1].rows
    again(folder, "harsh", changes=["label.wrong=-3.0"])
    compare(stored(folder, 0), ["grpo"])
    assert {one.path: one.manifest.digest for one in artifacts_of(folder)} == before
    assert gather_metrics(folder).num_rows == numbers
    assert status(folder, every=True)[1].rows == told
    assert {one.variant for one in catalog([folder]) if one.kind == "labels"} == {None, "harsh"}


def test_asked_the_same_again_it_is_there_and_asked_something_else_it_is_refused(folder):
    again(folder, "harsh", changes=["label.wrong=-3.0"])
    before = labelled(folder, "harsh").manifest
    again(folder, "harsh", changes=["label.wrong=-3.0"])
    assert labelled(folder, "harsh").manifest == before
    with pytest.raises(ArtifactError, match=r"different computation .*wrong"):
        again(folder, "harsh", changes=["label.wrong=-4.0"])
    assert labelled(folder, "harsh").manifest == before


@pytest.mark.parametrize(
    ("wish", "error", "told"),
    [
        ({}, ExperimentError, "nothing is to be different"),
        ({"grader": "mth"}, InputError, "no grader is called 'mth'"),
        ({"label": "verifyer"}, ExperimentError, "verifyer"),
        ({"changes": ["label.wrng=1"]}, ExperimentError, "wrng"),
        ({"label": "reward_model"}, InputError, "no judgements"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(folder, wish, error, told):
    with pytest.raises(error, match=told):
        again(folder, "x", **wish)
    assert list((folder / "relabeled").rglob("manifest.json")) == []


def test_a_name_cannot_lead_out_of_the_run(folder):
    with pytest.raises(ExperimentError, match="plain name"):
        again(folder, "../x", grader="math")


def test_compared_recipes_are_credited_anew_when_the_recipe_has_changed(folder):
    [first] = compare(stored(folder, 0), ["grpo"]).credited
    experiment = Experiment.load(folder / EXPERIMENT_FILE)
    changes = {**experiment.recipe_changes, "grpo": {"advantage": {"kind": "leave_one_out"}}}
    changed = experiment.model_copy(update={"recipe_changes": changes})
    (folder / EXPERIMENT_FILE).write_text(changed.dump())
    [second] = compare(stored(folder, 0), ["grpo"]).credited
    assert not (first.tokens == second.tokens).all()
