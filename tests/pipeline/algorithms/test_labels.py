"""A reward for every response."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.algorithms.filters import first
from pipeline.algorithms.labels import LABELS, likelihood, majority_vote, reward_model, self_confidence, verifier
from pipeline.algorithms.shelf import Line

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "labels.json").read_text())


def golden(section):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in GOLDEN[section]])


def test_right_and_wrong_get_their_rewards_and_no_verdict_counts_as_wrong():
    verdicts = np.array([1.0, 0.0, np.nan])
    labels = verifier(verdicts, correct=1.0, wrong=-1.0)
    np.testing.assert_array_equal(labels.rewards, np.array([1, -1, -1], np.float32))
    np.testing.assert_array_equal(labels.verdicts, verdicts)
    assert labels.rewards.dtype == np.float32


def test_a_recipe_line_gives_the_same():
    piece = LABELS.take(Line(kind="verifier"))
    labels = piece({"verdicts": np.array([0.0, 1.0]), "group": np.array([0, 0])})
    np.testing.assert_array_equal(labels.rewards, np.array([0, 1], np.float32))


@pytest.mark.parametrize(("clip", "expected"), [(None, [-3.0, 0.5, 7.0]), (2.0, [-2.0, 0.5, 2.0])])
def test_scores_are_rewards_within_bounds_and_give_no_verdict(clip, expected):
    labels = reward_model(np.array([-3.0, 0.5, 7.0]), clip=clip)
    np.testing.assert_array_equal(labels.rewards, np.array(expected, np.float32))
    assert labels.rewards.dtype == np.float32
    assert np.isnan(labels.verdicts).all()


@golden("majority_vote")
def test_majority_vote_golden(case):
    inputs, expected = case["inputs"], case["outputs"]
    answers = np.array(inputs["answers"])
    sample = np.array(inputs.get("sample", range(len(answers))))
    labels = majority_vote(answers, np.zeros(len(answers), np.int64), sample)
    kept = first(sample, n=inputs.get("n", len(answers))).keep
    np.testing.assert_array_equal(labels.rewards[kept], expected["rewards"])
    np.testing.assert_array_equal(labels.verdicts, labels.rewards)
    np.testing.assert_array_equal(labels.target, expected["target"])
    np.testing.assert_allclose(labels.vote_share.max(), expected["vote_share"])
    np.testing.assert_array_equal(labels.vote_share[answers == -1], 0)
    if "gold" in inputs:
        gold = np.array(inputs["gold"], float)
        assert (labels.verdicts == gold).mean() == expected["reward_accuracy"]
        assert bool(gold[answers == labels.target][0]) == expected["label_right"]


def test_groups_vote_apart_and_each_knows_its_target():
    answers, group = np.array([0, 5, 0, 5, 5, -1]), np.array([4, 9, 4, 9, 4, 9])
    labels = majority_vote(answers, group, np.array([0, 0, 1, 1, 2, 2]), correct=2.0, wrong=-1.0)
    np.testing.assert_array_equal(labels.target, [0, 5, 0, 5, 0, 5])
    np.testing.assert_array_equal(labels.rewards, np.array([2, 2, 2, 2, -1, -1], np.float32))
    np.testing.assert_allclose(labels.vote_share, [2 / 3, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 0])


def test_the_greedy_response_does_not_vote_and_is_rewarded_like_the_others():
    labels = majority_vote(np.array([1, 1, 0]), np.zeros(3, np.int64), np.array([-1, 1, 0]))
    np.testing.assert_array_equal(labels.target, 0)
    np.testing.assert_allclose(labels.vote_share, 0.5)
    alone = majority_vote(np.array([0]), np.zeros(1, np.int64), np.array([-1]))
    assert (alone.target.item(), alone.rewards.item(), alone.vote_share.item()) == (-1, 0, 0)
    right = majority_vote(np.array([1, 1, 0]), np.zeros(3, np.int64), np.array([-1, 0, 1]))
    np.testing.assert_array_equal(right.rewards, [1, 1, 0])


def test_no_rows_have_no_majority():
    assert majority_vote(*(np.zeros(0, np.int64),) * 3).rewards.shape == (0,)


@golden("likelihood")
def test_likelihood_golden(case):
    inputs, expected = case["inputs"], case["outputs"]
    logprobs = np.array(inputs["sums"])[:, None] / 2 * np.array([[1.0, 1.0, 9.0]])
    mask = np.broadcast_to([True, True, False], logprobs.shape)
    np.testing.assert_allclose(likelihood(logprobs, mask), expected["float64"], rtol=1e-6)
    stored = self_confidence(logprobs, mask, alpha=0.0)
    np.testing.assert_allclose(stored.rewards, expected["float32"], rtol=1e-4)
    np.testing.assert_array_equal(stored.rewards == 0, expected["float32_is_zero"])
    np.testing.assert_array_equal(stored.added_nothing, expected["float32_is_zero"])


@golden("self_confidence")
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-6), (np.float32, 1e-4)], ids=["float64", "float32"])
def test_self_confidence_golden(case, dtype, rtol):
    inputs, expected = case["inputs"], case["outputs"]
    logprobs = np.full((1, inputs["tokens"]), inputs["token_logprob"], dtype)
    mask = np.ones_like(logprobs, bool)
    np.testing.assert_allclose(np.log(likelihood(logprobs, mask)), expected["sum"], rtol=rtol)
    labels = self_confidence(logprobs, mask, alpha=inputs["alpha"])
    np.testing.assert_allclose(labels.rewards, expected["rewards"], rtol=rtol)
    assert labels.added_nothing.item() is expected["added_nothing"]
    assert labels.rewards.dtype == np.float32
    assert np.isnan(labels.verdicts).all()


@pytest.mark.parametrize(("nat", "lost"), [(-18.5, False), (-19.5, True)])
def test_a_probability_is_lost_beside_alpha_where_float32_ends(nat, lost):
    labels = self_confidence(np.array([[nat]]), np.array([[True]]), alpha=0.1)
    assert labels.added_nothing.item() is lost
