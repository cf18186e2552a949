"""People in the loop: a run waits for their rankings, goes on with them, and ranks candidates of later policies too."""

import csv
import json

import pytest

from flows.execute import walk
from flows.run import MissingError, Run, look_up
from pipeline.artifacts import Artifact
from pipeline.errors import InputError, WaitingError
from pipeline.experiment import Experiment
from pipeline.grading import judge


@pytest.fixture
def loop(tmp_path, every_recipe, here_and_now):
    """A run of a recipe with a reward model on the transformers engine, with changes."""
    file = tmp_path / "small.toml"
    file.write_text(every_recipe)

    def make(*changes, name="people"):
        experiment = Experiment.load(file, ["resources.engine=transformers", *changes], "rloo", name)
        return Run(experiment, tmp_path / "runs", here_and_now)

    return make


def rank_as_a_person(run, folder, annotator="anna"):
    """Lines that the annotators' page would save: right answers first, the others tied behind them."""
    answers = {row["prompt_id"]: row["answer"] for row in Artifact.open(run.base / "prompts").table().to_pylist()}
    lines = []
    for question in Artifact.open(folder / "questions").table().to_pylist():
        answer = answers[question["prompt_id"]]
        count = len(question["responses"])
        verdicts = judge("exact", question["responses"], [answer] * count, timeout=5, workers=1)
        ranks = {
            name: 1 if verdict.correct else 2 for name, verdict in zip(question["response_ids"], verdicts, strict=True)
        }
        lines.append({"question_id": question["question_id"], "annotator": annotator, "ranks": ranks})
    return lines


def hand_in(lines, folder, name="anna.jsonl"):
    (folder / "annotations" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_waits_for_people_and_goes_on_with_what_they_said(loop):
    run = loop("feedback.by=people")
    with pytest.raises(WaitingError, match="questions wait") as waiting:
        walk(run)
    assert str(run.base / "questions" / "annotate.html") in waiting.value.where
    assert str(run.base / "annotations") in waiting.value.do
    assert (run.base / "questions" / "annotate.html").is_file()
    lines = rank_as_a_person(run, run.base)
    hand_in(lines, run.base)
    walk(run)
    rankings = Artifact.open(run.base / "rankings")
    said = {line["question_id"]: line["ranks"] for line in lines}
    questions = {q["question_id"]: q for q in Artifact.open(run.base / "questions").table().to_pylist()}
    by_texts = {
        (q["prompt_id"], text): said[q["question_id"]][response_id] - 1
        for q in questions.values()
        for text, response_id in zip(q["responses"], q["response_ids"], strict=True)
    }
    for row in rankings.table().to_pylist():
        assert row["annotator"] == "anna"
        assert row["ranks"] == [by_texts[row["prompt_id"], text] for text in row["responses"]]
    inputs = Artifact.open(run.base / "reward").manifest.inputs
    assert [record.digest for record in inputs["rankings"]] == [rankings.manifest.digest]


def test_a_wrong_file_stops_the_run_and_leaves_it_as_it_was(loop):
    run = loop("feedback.by=people")
    with pytest.raises(WaitingError):
        walk(run)
    lines = rank_as_a_person(run, run.base)
    hand_in([*lines, lines[0]], run.base)
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    with pytest.raises(InputError, match=r"anna\.jsonl"):
        walk(run)
    after = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    assert {p: t for p, t in after.items() if p.is_file()} == {p: t for p, t in before.items() if p.is_file()}
    assert not list(run.base.glob(".part-*"))


def test_the_sheet_for_a_spreadsheet_comes_back_as_well(loop):
    run = loop("feedback.by=people")
    with pytest.raises(WaitingError):
        walk(run)
    ranks = {line["question_id"]: line["ranks"] for line in rank_as_a_person(run, run.base)}
    with (run.base / "questions" / "annotate.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row |= {"annotator": "anna", "rank": str(ranks[row["question_id"]][row["response_id"]])}
    with (run.base / "annotations" / "anna.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    walk(run)
    assert Artifact.open(run.base / "rankings").stats["rows"] > 0


def test_candidates_of_later_policies_are_ranked_and_a_reward_model_learns_from_all(loop):
    run = loop("feedback.every=1", "scale.iterations=3", name="again")
    walk(run)
    models, seen = [Artifact.open(run.base / "reward")], [Artifact.open(run.base / "rankings").manifest.digest]
    for number in (1, 2):
        here = run.iteration(number)
        before = run.iteration(number - 1) / "policy"
        sampled = Artifact.open(here / "candidates").manifest.inputs["policy"][0]
        assert sampled.digest == Artifact.open(before).manifest.digest
        seen.append(Artifact.open(here / "rankings").manifest.digest)
        models.append(Artifact.open(here / "reward"))
        assert [record.digest for record in models[-1].manifest.inputs["rankings"]] == seen
        judged_by = Artifact.open(here / "judgements-0").manifest.inputs["reward_model"][0]
        assert judged_by.digest == models[-1].manifest.digest
    assert not (run.iteration(0) / "reward").exists()
    assert len({model.manifest.digest for model in models}) == 3


def test_a_look_at_a_waiting_run_says_what_is_missing(loop):
    run = loop("feedback.by=people")
    looking = Run(run.experiment, run.root, look_up)
    with pytest.raises(MissingError):
        walk(looking)
    with pytest.raises(WaitingError):
        walk(run)
    with pytest.raises(WaitingError):
        walk(looking)
