import subprocess

import numpy as np
import pytest

from pipeline.algorithms.filters import FILTERS
from pipeline.algorithms.shelf import Line
from pipeline.artifacts import Artifact
from pipeline.contracts import PROMPTS, ROLLOUTS
from pipeline.errors import ContractError, ExperimentError, RecipeError
from pipeline.grading import Judgement
from stages.label import Settings, dropped, label, majority_right, without_surplus

VERIFIER = {"kind": "verifier", "correct": 1.0, "wrong": -1.0}
MIXED = {"kind": "mixed_outcomes"}


def settings(**changes):
    return Settings.of(None, {"label": VERIFIER, **changes})


def prompt(name, answer="1", grader="exact"):
    messages = [{"role": "user", "content": name}]
    return {"prompt_id": name, "messages": messages, "answer": answer, "grader": grader, "source": "hand"}


def response(name, sample, text):
    return {
        "prompt_id": name, "sample": sample, "prompt_tokens": [1], "response_tokens": [2, 3], "response": text,
        "sampler_logprobs": [-1.0, -1.0], "finish": "stop", "seed": 0,
    }  # fmt: skip


def group(name, texts):
    return [response(name, sample, text) for sample, text in enumerate(texts)]


@pytest.fixture
def labelled(by_hand, tmp_path):
    """`label` of groups, given as name -> texts, one dictionary per part; every reference is `1`."""

    def run(*parts, prompts=None, out="out", **changes):
        asked = prompts or [prompt(name) for name in dict.fromkeys(n.partition("#")[0] for part in parts for n in part)]
        rollouts = by_hand(
            ROLLOUTS, *([row for name, texts in part.items() for row in group(name, texts)] for part in parts)
        )
        return label.run(
            tmp_path / out, settings(**changes), rollouts=rollouts.path, prompts=by_hand(PROMPTS, asked).path
        )

    return run


def column(artifact, name):
    return artifact.table()[name].to_pylist()


def test_every_response_is_rewarded_and_told_why(labelled, sound):
    made = labelled({"a": ["1", "so;1", "2", " "]}, {"b": ["1"]})
    sound(made)
    assert column(made, "reward") == [1.0, 1.0, -1.0, -1.0, 1.0]
    assert column(made, "correct") == [True, True, False, False, True]
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


def test_a_response_that_hangs_the_grader_is_dropped_and_the_others_are_judged(labelled):
    asked = [prompt("a", answer="\\frac{1}{2}", grader="math")]
    texts = ["\\boxed{0.5}", "\\boxed{9^{9^{9^{9^9}}}}", "\\boxed{3}"]
    made = labelled({"a": texts}, prompts=asked, grader_seconds=1.0, filter=[MIXED])
    assert column(made, "correct") == [True, None, False]
    assert column(made, "verdict") == ["correct", "timeout", "wrong"]
    assert column(made, "dropped") == [None, "grader timeout", None]


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


def test_the_majority_is_the_earliest_of_equals_and_finding_nothing_is_no_vote():
    votes = [("7", True), ("8", False), ("8", False), ("7", True), (None, False), (None, False), (None, False)]
    judgements = [Judgement(right, answer, "correct" if right else "wrong") for answer, right in votes]
    one = np.zeros(7, dtype=np.int64)
    assert majority_right(one, judgements) == [True]
    assert majority_right(one, [*judgements[1:], judgements[0]]) == [False]
    assert majority_right(one[:1], [Judgement(False, None, "no answer")]) == [False]


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
