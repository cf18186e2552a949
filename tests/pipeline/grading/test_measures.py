import math

import numpy as np
import pytest

from pipeline.grading import Judgement
from pipeline.grading.measures import accuracies, election, majority_right


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
