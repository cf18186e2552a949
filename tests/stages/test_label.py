import json
import math
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import grading
from pipeline.algorithms.filters import FILTERS
from pipeline.algorithms.shelf import Line
from pipeline.artifacts import Artifact
from pipeline.contracts import PROMPTS, ROLLOUTS, SCORES
from pipeline.errors import ContractError, ExperimentError, InputError, RecipeError
from pipeline.experiment import Experiment
from pipeline.grading import judge
from pipeline.grading.pool import Pool, shared_pool
from stages.label import Settings, dropped, label, lottery, without_surplus

ROOT = Path(__file__).parents[2]
VERIFIER = {"kind": "verifier", "correct": 1.0, "wrong": -1.0}
VOTE = {"kind": "majority_vote"}
CONFIDENCE = {"kind": "self_confidence"}
MODEL = {"kind": "reward_model"}
MIXED = {"kind": "mixed_outcomes"}
HANGS = "\\boxed{9^{9^{9^{9^9}}}}"


def settings(**changes):
    return Settings.of(None, {"label": VERIFIER, **changes})


def prompt(name, answer="1", grader="exact"):
    messages = [{"role": "user", "content": name}]
    return {"prompt_id": name, "messages": messages, "answer": answer, "grader": grader, "source": "hand"}


def response(name, sample, text, logprob=-1.0):
    return {
        "prompt_id": name, "sample": sample, "prompt_tokens": [1], "response_tokens": [2, 3], "response": text,
        "sampler_logprobs": None if logprob is None else [logprob, logprob], "finish": "stop", "seed": 0,
    }  # fmt: skip


def group(name, texts, first=0, logprob=-1.0):
    return [response(name, sample, text, logprob) for sample, text in enumerate(texts, start=first)]


@pytest.fixture
def labelled(by_hand, tmp_path):
    """`label` of groups, given as name -> texts, one dictionary per part; every reference is `1`.

    `first` is the number of the first sample, -1 where it is the greedy one; `scores` what a reward model said.
    """

    def run(*parts, prompts=None, out="out", first=0, logprob=-1.0, scores=None, **changes):
        asked = prompts or [prompt(name) for name in dict.fromkeys(n.partition("#")[0] for part in parts for n in part)]
        rows = [[row for name, texts in part.items() for row in group(name, texts, first, logprob)] for part in parts]
        judgements = None
        if scores is not None:
            keys = [(row["prompt_id"], row["sample"]) for part in rows for row in part]
            judged = [
                {"prompt_id": name, "sample": sample, "reward_scores": score}
                for (name, sample), score in zip(keys, scores, strict=False)
            ]
            judgements = by_hand(SCORES, judged).path
        return label.run(
            tmp_path / out, settings(**changes), rollouts=by_hand(ROLLOUTS, *rows).path,
            prompts=by_hand(PROMPTS, asked).path, judgements=judgements,
        )  # fmt: skip

    return run


def column(artifact, name):
    return artifact.table()[name].to_pylist()


def test_every_response_is_rewarded_and_told_why(labelled, sound):
    made = labelled({"a": ["1", "so;1", "2", " "]}, {"b": ["1"]})
    sound(made)
    assert column(made, "reward") == [1.0, 1.0, -1.0, -1.0, 1.0]
    assert column(made, "correct") == column(made, "gold") == [True, True, False, False, True]
    assert column(made, "extracted") == ["1", "1", "2", None, "1"]
    assert column(made, "target") == ["1"] * 5
    assert column(made, "verdict") == ["correct", "correct", "wrong", "no answer", "correct"]
    assert column(made, "keep") == [True] * 5
    assert column(made, "dropped") == [None] * 5


def test_groups_without_both_outcomes_are_dropped_with_the_reason(labelled):
    made = labelled({"a": ["1", "2"], "b": ["1", "1"]}, {"c": ["2", "2"], "d": ["2", "1"]}, filter=[MIXED])
    assert column(made, "keep") == [True, True, False, False, False, False, True, True]
    assert column(made, "dropped")[2:6] == ["constant outcomes"] * 4
    assert column(made, "reward") == [1, -1, 1, 1, -1, -1, -1, 1]
    assert (made.stats["groups/kept"], made.stats["groups/seen"]) == (2, 4)
    assert made.stats["dropped/constant_outcomes"] == 4


def test_filters_work_one_after_the_other(labelled):
    made = labelled({"a": ["1", "1", "2"], "b": ["2", "1", "1"]}, filter=[{"kind": "first", "n": 2}, MIXED])
    assert column(made, "dropped") == [
        "constant outcomes", "constant outcomes", "beyond first 2", None, None, "beyond first 2",
    ]  # fmt: skip


def test_groups_beyond_the_room_are_surplus_across_parts(labelled):
    parts = ({"a": ["1", "2"], "b": ["1", "1"]}, {"c": ["2", "1"]}, {"d": ["1", "2"], "e": ["2", "2"]})
    made = labelled(*parts, filter=[MIXED], room=2)
    reasons = [None, None, *["constant outcomes"] * 2, None, None, *["surplus group"] * 2, *["constant outcomes"] * 2]
    assert column(made, "dropped") == reasons
    assert (made.stats["groups/kept"], made.stats["dropped/surplus_group"]) == (2, 2)
    none = labelled(*parts, filter=[MIXED], room=0, out="no room")
    assert (none.stats["groups/kept"], none.stats["dropped/surplus_group"]) == (0, 6)
    all_of_them = labelled(*parts, filter=[MIXED], out="all")
    assert all_of_them.stats["groups/kept"] == 3


def test_the_room_is_counted_in_the_order_of_the_rows():
    reasons, kept = without_surplus([None, None, None, "x", None], np.array([2, 2, 0, 0, 1]), 2)
    assert (reasons, kept) == ([None, None, None, "x", "surplus group"], 2)


def test_rows_without_a_verdict_are_dropped_and_not_punished(labelled):
    asked = [prompt("a"), prompt("b", answer=" ")]
    made = labelled({"a": ["1", "2"], "b": ["1", "2"]}, prompts=asked)
    assert column(made, "verdict") == ["correct", "wrong", "bad reference", "bad reference"]
    assert column(made, "correct") == [True, False, None, None]
    assert column(made, "extracted") == ["1", "2", "1", "2"]
    assert column(made, "dropped") == [None, None, "bad reference", "bad reference"]
    assert made.stats["verdict/bad_reference"] == made.stats["dropped/bad_reference"] == 2
    assert made.stats["accuracy/mean"] == 0.5


@pytest.mark.parametrize(("status", "reason"), [("timeout", "grader timeout"), ("error", "grader error")])
def test_a_grader_that_failed_costs_the_row_and_not_its_group(status, reason):
    columns = {
        "verdicts": np.array([1.0, np.nan, 0.0, np.nan, 1.0]),
        "group": np.array([0, 0, 0, 1, 1]),
        "sample": np.array([0, 1, 2, 0, 1]),
    }
    statuses = ["correct", status, "wrong", status, "correct"]
    mixed = FILTERS.take(Line(**MIXED))
    assert dropped(columns, [mixed], statuses) == [None, reason, None, reason, "constant outcomes"]
    assert dropped(columns, [], statuses) == [None, reason, None, reason, None]
    assert dropped(columns, [], [None] * 5) == [None] * 5


def test_a_response_that_hangs_the_grader_is_dropped_and_the_others_are_judged(labelled):
    asked = [prompt("a", answer="\\frac{1}{2}", grader="math")]
    texts = ["\\boxed{0.5}", HANGS, "\\boxed{3}"]
    made = labelled({"a": texts}, prompts=asked, grader_seconds=1.0, filter=[MIXED])
    assert column(made, "correct") == [True, None, False]
    assert column(made, "verdict") == ["correct", "timeout", "wrong"]
    assert column(made, "dropped") == [None, "grader timeout", None]


@pytest.fixture
def slow(by_hand):
    """Inputs of two parts whose grading takes seconds: two responses hang."""
    texts = [HANGS + " " * n if n in (4, 14) else f"\\boxed{{{n}}}" for n in range(20)]
    parts = [group("a", texts), group("b", texts[:8])]
    asked = [prompt(name, answer="3", grader="math") for name in "ab"]
    return {"rollouts": by_hand(ROLLOUTS, *parts).path, "prompts": by_hand(PROMPTS, asked).path}


@pytest.fixture
def sent(monkeypatch):
    """The rows that are handed to grading processes; this one remembers nothing of earlier tests."""
    seen, judge_rows = [], Pool.judge
    monkeypatch.setattr(grading, "_known", {})

    def watched(pool, rows, **how):
        seen.extend(rows)
        return judge_rows(pool, rows, **how)

    monkeypatch.setattr(Pool, "judge", watched)
    return seen


@pytest.mark.parametrize("labeler", [VERIFIER, VOTE], ids=lambda line: line["kind"])
def test_a_killed_labelling_keeps_its_judgements(slow, tmp_path, sent, labeler):
    given = settings(label=labeler, grader_seconds=1.2)
    words = label.command(tmp_path / "out", given, **slow)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        kept = []
        while len(kept) < 7:
            assert process.poll() is None
            time.sleep(0.002)
            for path in tmp_path.glob(".part-out-*/working/judgements.jsonl"):
                kept = path.read_bytes().splitlines()
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (path,) = tmp_path.glob(".part-out-*/working/judgements.jsonl")
    kept = path.read_text().splitlines()
    assert not {json.loads(line.partition(" ")[2])[-1] for line in kept} & {"timeout", "error"}
    made = label.run(tmp_path / "out", given, **slow)
    resumed = list(sent)
    sent.clear()
    grading._known.clear()
    whole = label.run(tmp_path / "whole", given, **slow)
    assert made.manifest.digest == whole.manifest.digest
    assert len(sent) - len(resumed) >= len(kept) - 1  # the last line may be cut off
    assert Counter(resumed) <= Counter(sent)
    moments = {"seconds", "grader/retried", "grader/recovered"}  # of the machine
    assert {name: made.stats[name] for name in whole.stats if name not in moments} == {
        name: value for name, value in whole.stats.items() if name not in moments
    }


def test_rows_that_hang_are_tried_once_more_and_counted(labelled, numbers):
    asked = [prompt("a", answer="3", grader="math"), prompt("b", answer="3")]
    made = labelled({"a": ["\\boxed{3}", HANGS, "4"], "b": ["3", "1"]}, prompts=asked, grader_seconds=1.2)
    assert made.stats["grader/failures"] == numbers(made)["grader/failures", 0] == 1 / 5
    assert (made.stats["grader/retried"], made.stats["grader/recovered"]) == (1, 0)
    assert (numbers(made)["grader/retried", 0], numbers(made)["grader/recovered", 0]) == (1, 0)


def test_a_grading_process_that_stood_still_for_a_moment_costs_no_label(labelled):
    shared_pool("math").close()
    judge("math", ["A: 1"], ["1"], workers=1)
    (worker,) = (one for one in psutil.Process().children() if "pipeline.grading.worker" in one.cmdline())
    worker.suspend()
    made = labelled({"a": ["3", "4"]}, prompts=[prompt("a", answer="3", grader="math")], grader_seconds=1.2)
    assert column(made, "verdict") == ["correct", "wrong"]
    assert made.stats["grader/retried"] == made.stats["grader/recovered"] == 1
    assert made.stats["grader/failures"] == 0


@pytest.mark.parametrize("labeler", [VERIFIER, VOTE, CONFIDENCE], ids=lambda line: line["kind"])
def test_failures_are_a_share_of_what_was_graded_the_greedy_response_included(labelled, labeler):
    """An extraction, or a comparison, that is lost; where nothing is graded there are none."""
    asked = [prompt("a", grader="math"), prompt("b", answer=None, grader="none")]
    if labeler != CONFIDENCE:
        asked[1] = prompt("b")
    groups = {"a": [HANGS, "1", HANGS, "2"]} | ({"b": ["1"]} if labeler == CONFIDENCE else {})
    made = labelled(groups, prompts=asked, label=labeler, grader_seconds=1.2, first=-1)
    assert made.stats["grader/failures"] == 2 / 4


def test_where_nothing_is_graded_nothing_fails(labelled):
    made = labelled({"a": ["1", "2"]}, label=CONFIDENCE, prompts=[prompt("a", None, "none")])
    assert made.stats["grader/failures"] == made.stats["grader/retried"] == 0


def test_each_prompt_names_its_grader(labelled):
    asked = [prompt("a", answer="0.5", grader="math"), prompt("b", answer="0.5", grader="exact")]
    made = labelled({"a": ["\\boxed{\\frac{1}{2}}", "1"], "b": ["1/2", "0.5"]}, prompts=asked)
    assert column(made, "correct") == [True, False, False, True]


def test_a_second_draw_is_judged_by_the_same_prompt_and_is_a_group_of_its_own(labelled):
    made = labelled({"a": ["1", "2"], "a#1": ["1", "1"]}, filter=[MIXED])
    assert column(made, "keep") == [True, True, False, False]
    assert made.stats["groups/seen"] == 2


def test_prompts_without_an_answer_or_a_grader(labelled, tmp_path):
    for bad in (prompt("b", answer=None), prompt("b", grader="none")):
        with pytest.raises(ContractError, match="1 prompts have no answer or grader: b"):
            labelled({"a": ["1"], "b": ["1"]}, prompts=[prompt("a"), bad])
    assert not (tmp_path / "out").exists()


def test_prompts_that_were_not_sampled_from(labelled):
    with pytest.raises(ContractError, match="2 prompts of the rollouts are not among the prompts: b, c"):
        labelled({"a": ["1"], "b": ["1"], "c#1": ["1"]}, prompts=[prompt("a")])


def test_settings_that_name_no_piece(labelled):
    with pytest.raises(ExperimentError, match="label"):
        Settings.of(None, {})
    for changes in ({"label": {"kind": "verifer"}}, {"filter": [{"kind": "first"}]}):
        with pytest.raises(RecipeError):
            labelled({"a": ["1"]}, **changes)


def test_the_numbers(labelled, numbers):
    made = labelled({"a": ["1", "2", "2", "1"], "b": ["2", "2", "2", "2"]}, {"c": ["1", "1", "1", " "]})
    expected = {
        "reward/mean": (5 - 7) / 12, "groups/kept": 3.0, "groups/seen": 3.0, "reward/zero_spread_groups": 1 / 3,
        "reward/std": float(np.std([1.0] * 5 + [-1.0] * 7)), "accuracy/mean": (0.5 + 0 + 0.75) / 3,
        "accuracy/pass_at_k": 2 / 3, "accuracy/majority_at_k": 2 / 3, "verdict/correct": 5.0, "verdict/wrong": 6.0,
        "verdict/no_answer": 1.0,
    }  # fmt: skip
    measured = numbers(made)
    for name, value in expected.items():
        assert made.stats[name] == pytest.approx(value, rel=1e-6), name
        assert measured[name, 0] == made.stats[name]
    assert made.stats["rows"] == 12


def test_agreement_with_the_majority_is_rewarded_and_the_truth_only_noted(labelled, sound):
    asked = [prompt("a", answer="3", grader="math"), prompt("b", answer=None, grader="math")]
    texts = {"a": ["A: 3", "A: 1/2", "A: 0.5", "no idea!"], "b": ["A: 7", "A: 8", "A: 7.0", " "]}
    made = labelled(texts, prompts=asked, label=VOTE, filter=[MIXED])
    sound(made)
    assert column(made, "reward") == [0, 1, 1, 0, 1, 0, 1, 0]
    assert column(made, "correct") == [bool(reward) for reward in column(made, "reward")]
    assert column(made, "gold") == [True, False, False, False, None, None, None, None]
    assert column(made, "verdict") == ["correct", "wrong", "wrong", "no answer", None, None, None, None]
    assert column(made, "extracted") == ["3", "1/2", "0.5", None, "7", "8", "7.0", None]
    assert column(made, "target") == ["1/2"] * 4 + ["7"] * 4
    assert column(made, "vote_share") == [0.25, 0.5, 0.5, 0, 0.5, 0.25, 0.5, 0]
    assert column(made, "keep") == [True] * 8
    expected = {
        "vote/label_accuracy": 0.0, "vote/reward_accuracy": 0.25, "vote/majority_ratio": 0.5, "vote/tie_rate": 0.0,
        "vote/no_answer": 0.0, "vote/lost_comparisons": 0.0, "accuracy/mean": 0.25, "accuracy/pass_at_k": 1.0,
        "vote/entropy": -(math.log(2 / 3) * 2 + math.log(1 / 3)) / 3, "verdict/wrong": 2.0, "groups/seen": 2.0,
    }  # fmt: skip
    for name, value in expected.items():
        assert made.stats[name] == pytest.approx(value), name


def test_how_the_votes_went(labelled):
    made = labelled({"a": ["2", "1"], "b": [" ", " "]}, {"c": ["1", "1"]}, label=VOTE)
    assert column(made, "reward") == [1, 0, 0, 0, 1, 1]
    assert column(made, "target") == ["2", "2", None, None, "1", "1"]
    expected = {
        "vote/label_accuracy": 1 / 3, "vote/reward_accuracy": 4 / 6, "vote/majority_ratio": 1.5 / 3,
        "vote/tie_rate": 1 / 3, "vote/no_answer": 1 / 3, "vote/entropy": math.log(2) / 2,
    }  # fmt: skip
    for name, value in expected.items():
        assert made.stats[name] == pytest.approx(value), name
    assert not [name for name in labelled({"a": ["1"]}, out="no vote").stats if name.startswith("vote/")]


def test_an_answer_that_hangs_the_vote_is_dropped_and_not_punished(labelled):
    texts = ["A: 1", HANGS, "A: 2", "no idea!"]
    made = labelled({"a": texts}, prompts=[prompt("a", grader="math")], grader_seconds=1.2, label=VOTE)
    assert column(made, "dropped") == [None, "grader timeout", None, None]
    assert column(made, "gold") == [True, None, False, False]
    made = labelled(
        {"a": texts}, prompts=[prompt("a", grader="math")], grader_seconds=1.2, label=CONFIDENCE, out="no grader needed"
    )
    assert column(made, "keep") == [True] * 4
    assert column(made, "verdict") == ["correct", "timeout", "wrong", "no answer"]


def test_the_reward_model_says_what_a_response_is_worth_and_not_whether_it_is_right(labelled, sound):
    made = labelled({"a": ["1", "2"], "b": ["2"]}, scores=[0.5, -2.0, 3.0], label=MODEL)
    sound(made)
    assert column(made, "reward") == [0.5, -2.0, 3.0]
    assert column(made, "correct") == column(made, "target") == column(made, "vote_share") == [None] * 3
    assert column(made, "gold") == [True, False, False]
    assert made.stats["accuracy/mean"] == 0.25


def test_a_reward_model_that_has_not_judged(labelled):
    with pytest.raises(InputError, match="needs reward_scores, and there are no judgements") as error:
        labelled({"a": ["1"]}, label=MODEL)
    assert 'needs=["reward_scores"]' in error.value.do
    with pytest.raises(ContractError, match=r"1 rows have no score; first: \[\('a', 1\)\]"):
        labelled({"a": ["1", "2"]}, scores=[0.5], label=MODEL)


def test_judgements_without_the_column(by_hand, labels, rollouts, prompts, tmp_path):
    other = [{"prompt_id": "a", "sample": 0, "old_logprobs": [-1.0]}]
    with pytest.raises(ContractError, match="these scores have no reward_scores"):
        label.run(
            tmp_path / "out", settings(label=MODEL), rollouts=rollouts.path, prompts=prompts.path,
            judgements=by_hand(SCORES, other).path,
        )  # fmt: skip


def test_confidence_is_the_probability_and_its_underflow_is_measured(labelled):
    made = labelled({"a": ["1", "2"]}, label=CONFIDENCE, prompts=[prompt("a", None, "none")])
    assert column(made, "reward") == pytest.approx([math.exp(-2) + 0.1] * 2)
    assert made.stats["reward/underflow"] == 0.0
    assert column(made, "gold") == column(made, "extracted") == column(made, "verdict") == [None] * 2
    assert labelled({"a": ["1"]}, label=CONFIDENCE, logprob=-400.0, out="tiny").stats["reward/underflow"] == 1.0
    with pytest.raises(ContractError, match="adopted without them"):
        labelled({"a": ["1"]}, label=CONFIDENCE, logprob=None, out="adopted")


def test_a_vote_without_a_grader(labelled):
    with pytest.raises(ContractError, match="1 prompts have no grader: b"):
        labelled({"a": ["1"], "b": ["1"]}, prompts=[prompt("a", None), prompt("b", grader="none")], label=VOTE)


@pytest.mark.parametrize("labeler", [VOTE, CONFIDENCE, MODEL], ids=lambda line: line["kind"])
def test_the_truth_changes_nothing_but_what_people_see(labelled, labeler):
    parts = {"a": ["1", "2", "2", " "], "b": ["so;3", "1", "4", "1"]}, {"c": ["5", "5", "6", "5"]}
    made = [
        labelled(
            *parts, prompts=[prompt(name, answer) for name, answer in zip("abc", answers, strict=True)],
            label=labeler, filter=[{"kind": "drawn", "n": 3}], room=2, scores=range(12), out=str(number),
        )
        for number, answers in enumerate([("1", "1", "5"), ("2", "9", ";"), (None, "1", None), (None, None, None)])
    ]  # fmt: skip
    seen = [artifact.table().drop_columns(["gold", "verdict"]) for artifact in made]
    assert all(table.equals(seen[0]) for table in seen)
    assert len({str(column(artifact, "gold")) for artifact in made}) == 4
    assert "accuracy/mean" in made[2].stats and "accuracy/mean" not in made[3].stats


def test_the_greedy_response_is_rewarded_and_counts_nowhere(labelled):
    parts = {"a": ["1", "1", "2"], "b": ["2", "1", "1"]}, {"c": ["1", "2", "2"]}
    made = labelled(*parts, first=-1, filter=[MIXED])
    assert column(made, "reward") == [1, 1, -1, -1, 1, 1, 1, -1, -1]
    assert (
        column(made, "dropped") == ["greedy baseline", None, None] + ["greedy baseline", *["constant outcomes"] * 2] * 2
    )
    sampled = labelled(*({name: texts[1:] for name, texts in part.items()} for part in parts), filter=[MIXED], out="s")
    assert made.stats["reward/greedy_mean"] == pytest.approx(1 / 3)
    others = {"reward/greedy_mean", "dropped/greedy_baseline", "rows", "seconds"}
    assert {n: v for n, v in made.stats.items() if n not in others} == {
        n: v for n, v in sampled.stats.items() if n not in others
    }


def test_the_greedy_response_neither_votes_nor_breaks_a_tie(labelled):
    made = labelled({"a": ["2", "1", "2"]}, {"b": ["9", "1", "2"]}, first=-1, label=VOTE)
    assert column(made, "target") == ["1"] * 6
    assert column(made, "reward") == [0, 1, 0, 0, 1, 0]
    assert made.stats["vote/majority_ratio"] == 0.5


def test_a_group_whose_baseline_could_not_be_judged_does_not_train(labelled):
    asked = [prompt("a", grader="math"), prompt("b", grader="math")]
    made = labelled({"a": [HANGS, "A: 1", HANGS], "b": ["A: 1", "A: 2"]}, prompts=asked, first=-1, grader_seconds=1.2)
    assert column(made, "dropped") == ["greedy baseline", "no greedy reward", "grader timeout", "greedy baseline", None]


def test_the_lottery_depends_on_seed_and_key_alone(labelled, rollouts):
    part = next(rollouts.parts())
    numbers = lottery(part, 7)
    assert ((numbers >= 0) & (numbers < 1)).all() and len(set(numbers)) == part.num_rows
    np.testing.assert_array_equal(lottery(part.slice(3, 5), 7), numbers[3:8])
    assert not set(lottery(part, 8)) & set(numbers)
    texts, drawn = {"a": ["1", "2"] * 8}, [{"kind": "drawn", "n": 4}]
    one, other = (labelled(texts, filter=drawn, seed=seed, out=str(seed)) for seed in (1, 2))
    assert sum(column(one, "keep")) == sum(column(other, "keep")) == 4
    assert column(one, "keep") != column(other, "keep")


@pytest.mark.parametrize("labeler", [VERIFIER, VOTE, CONFIDENCE, MODEL], ids=lambda line: line["kind"])
def test_neither_parts_nor_their_order_change_a_label(labelled, labeler):
    texts = {"a": ["1", "2", "2"], "b": ["3", " ", "1"], "c": ["5", "5", "1"]}
    asked = [prompt(name) for name in texts]
    scores = {"abc": range(9), "cab": [6, 7, 8, 0, 1, 2, 3, 4, 5], "bca": [3, 4, 5, 6, 7, 8, 0, 1, 2]}
    tables = []
    for order, cut in (("abc", 3), ("cab", 1), ("bca", 2)):
        parts = [{name: texts[name] for name in order[at : at + cut]} for at in range(0, 3, cut)]
        made = labelled(
            *parts, prompts=asked, label=labeler, filter=[{"kind": "drawn", "n": 2}], scores=scores[order], out=order
        )
        stats = {name: pytest.approx(value) for name, value in made.stats.items() if name != "seconds"}
        tables.append((made.table().sort_by([("prompt_id", "ascending"), ("sample", "ascending")]).to_pylist(), stats))
    assert tables[0] == tables[1] == tables[2]


def test_the_experiment_gives_lines_and_seed(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        'recipe = "dapo"\nseed = 5\n[models.new]\nlayers = 2\n[data.demonstrations]\nsource = "arithmetic"\n'
        '[data.prompts]\nsource = "arithmetic"\n[resources]\ngrader_seconds = 2.5\n'
        "[scale]\niterations = 1\ngroups = 1\nprompt_tokens = 8\nresponse_tokens = 8\nlearning_rate = 1e-3\n"
    )
    chosen = Settings.of(Experiment.load(path), {"room": 3})
    assert (chosen.label.kind, chosen.filter[0].kind, chosen.room) == ("verifier", "mixed_outcomes", 3)
    assert (chosen.grader_seconds, chosen.seed) == (2.5, 5)


def test_the_same_twice_and_by_command(labels, rollouts, prompts, tmp_path):
    chosen = Settings.of(None, labels.manifest.settings)
    given = {"rollouts": rollouts.path, "prompts": prompts.path}
    assert label.run(tmp_path / "again", chosen, **given).manifest.digest == labels.manifest.digest
    subprocess.run(label.command(tmp_path / "typed", chosen, **given), check=True, capture_output=True)
    typed = Artifact.open(tmp_path / "typed")
    assert typed.manifest.fingerprint == labels.manifest.fingerprint
    assert typed.manifest.digest == labels.manifest.digest


def test_labels_stand_beside_their_rollouts(labels, rollouts, sound):
    sound(labels)
    keys = ["prompt_id", "sample"]
    assert labels.table(keys).equals(rollouts.table(keys))
    for row, text in zip(labels.table().to_pylist(), rollouts.table()["response"].to_pylist(), strict=True):
        assert row["correct"] == (text.rpartition(";")[2] == row["target"])
