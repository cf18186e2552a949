import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.grading import Judgement
from pipeline.grading.measures import accuracies, clustered, election, majority_right, win_rate


def gold(*right):
    statuses = {True: "correct", False: "wrong", None: "timeout"}
    return [Judgement(one, "x", statuses[one]) for one in right]


def test_the_majority_is_the_earliest_of_equals_and_finding_nothing_is_no_vote():
    votes = [("7", True), ("8", False), ("8", False), ("7", True), (None, False), (None, False), (None, False)]
    judgements = [Judgement(right, answer, "correct" if right else "wrong") for answer, right in votes]
    assert majority_right(judgements)
    assert not majority_right([*judgements[1:], judgements[0]])
    assert not majority_right([Judgement(False, None, "no answer")])


def test_accuracies_are_of_the_rows_with_a_verdict():
    assert accuracies([*gold(True, False, None, False), None]) == {
        "accuracy/mean": pytest.approx(1 / 3), "accuracy/pass_at_k": 1.0, "accuracy/majority_at_k": 0.0
    }  # fmt: skip
    assert accuracies([None, *gold(None)]) == {}


def vote(classes, target, *right):
    return election(np.array(classes), target, gold(*right) if right else [None] * len(classes))


def test_an_election_by_hand():
    ratios = (0.6, 0.2, 0.2)
    entropy = -sum(p * math.log(p) for p in ratios)
    assert vote([2, 0, 2, 1, 2, -1], 2) == {
        "vote/no_answer": 0.0, "vote/majority_ratio": 0.5, "vote/tie_rate": 0.0, "vote/entropy": pytest.approx(entropy)
    }  # fmt: skip
    assert vote([0, 1, 1, 0], 0)["vote/tie_rate"] == 1.0
    assert vote([-1, -1], -1) == {"vote/no_answer": 1.0, "vote/majority_ratio": 0.0, "vote/tie_rate": 0.0}


@pytest.mark.parametrize(
    ("classes", "target", "right", "accuracy"),
    [
        ([0, 1, 1], 1, (True, False, False), 0.0),
        ([0, 1, 1], 1, (False, None, True), 1.0),  # the first of the class that has a verdict
        ([-1, -1], -1, (False, False), 0.0),  # no answer is not the right one
        ([0, 0], 0, (None, None), None),
        ([-1, -1], -1, (None, None), None),
    ],
)
def test_whether_the_winner_is_right_is_said_where_it_is_known(classes, target, right, accuracy):
    assert vote(classes, target, *right).get("vote/label_accuracy") == accuracy


def test_a_mean_and_its_error_by_hand():
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    groups = np.array(["a", "a", "a", "b", "b", "c"])
    # mean 1/2; the groups exceed it by 1/2, 0 and -1/2; sqrt(3/2 * 1/2) / 6
    assert clustered(values, groups) == (0.5, pytest.approx(math.sqrt(0.75) / 6))


def test_the_error_of_equal_groups_is_that_of_their_means():
    rng = np.random.default_rng(0)
    values = rng.random((20, 4))
    mean, error = clustered(values.ravel(), np.repeat(np.arange(20), 4))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.mean(axis=1).std(ddof=1) / math.sqrt(20))


def test_rows_that_are_right_together_count_as_one():
    values = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    groups = np.arange(5)
    assert clustered(np.repeat(values, 8), np.repeat(groups, 8)) == pytest.approx(clustered(values, groups))


def test_one_group_has_no_error():
    mean, error = clustered(np.array([1.0, 0.0]), np.array([3, 3]))
    assert mean == 0.5 and math.isnan(error)


def test_a_win_rate_by_hand():
    ours = {"p": [1, 1, 0], "q": [0, 1], "only ours": [0, 0]}
    theirs = {"q": [1], "p": [1, 0], "only theirs": [1]}
    duel = win_rate(ours, theirs)
    # p: of 6 pairs 2 won, 3 tied, 1 lost, rate 7/12; q: of 2 pairs 1 tied, 1 lost, rate 1/4
    assert duel.rate == pytest.approx((7 / 12 + 1 / 4) / 2)
    assert (duel.wins, duel.ties, duel.losses) == pytest.approx((1 / 6, 1 / 2, 1 / 3))
    assert duel.error == pytest.approx((7 / 12 - 1 / 4) / 2)  # of two values: half their difference
    assert duel.decided == pytest.approx(1 / 3)
    assert duel.prompts == 2


def test_any_marks_can_be_compared():
    duel = win_rate({"p": [0.3, -2.0]}, {"p": [0.2]})
    assert (duel.rate, duel.wins, duel.ties, duel.losses) == (0.5, 0.5, 0.0, 0.5)
    assert math.isnan(duel.error)


def test_ties_alone_decide_nothing():
    duel = win_rate({"p": [1, 1], "q": [0]}, {"p": [1], "q": [0, 0]})
    assert (duel.rate, duel.ties, duel.decided, duel.error) == (0.5, 1.0, None, 0.0)


def test_without_a_common_prompt_nothing_can_be_compared():
    with pytest.raises(ValueError, match="no prompt"):
        win_rate({"p": [1]}, {"q": [1]})


marks = st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1)


@given(marks, marks)
def test_what_one_wins_the_other_loses(ours, theirs):
    ours, theirs = {"shared": [0, 1], **ours}, {"shared": [1, 2], **theirs}
    there, back = win_rate(ours, theirs), win_rate(theirs, ours)
    assert there.rate + back.rate == pytest.approx(1)
    assert (there.wins, there.ties, there.losses) == pytest.approx((back.losses, back.ties, back.wins))
    assert there.wins + there.ties + there.losses == pytest.approx(1)
    assert there.rate == pytest.approx(there.wins + there.ties / 2)
    assert there.error == pytest.approx(back.error, nan_ok=True)


@given(marks)
def test_against_oneself_it_is_one_half(ours):
    duel = win_rate(ours, ours)
    assert duel.rate == pytest.approx(0.5)
    assert duel.wins == pytest.approx(duel.losses)
    assert duel.decided is None or duel.decided == pytest.approx(0.5)


@given(marks, st.randoms())
def test_the_order_of_samples_and_prompts_does_not_matter(ours, random):
    theirs = {prompt: [1, 0] for prompt in ours}
    shuffled = {
        prompt: random.sample(ours[prompt], len(ours[prompt])) for prompt in random.sample(sorted(ours), len(ours))
    }
    assert win_rate(shuffled, theirs).rate == pytest.approx(win_rate(ours, theirs).rate)
