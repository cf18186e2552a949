"""From the rewards of tokens to the credit of tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from pipeline.algorithms.advantages import group_mean, leave_one_out, outcome
from pipeline.algorithms.shaping import kl_penalty, on_last_token

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "advantages.json").read_text())
MASK = np.array([[True, True, False], [True, True, True], [True, False, False]])
REWARDS = np.array([[0.5, 1.0, 9.0], [0.0, 0.0, 2.0], [4.0, 9.0, 9.0]])


@pytest.mark.parametrize("case", GOLDEN["group_mean"], ids=lambda case: case["name"])
def test_group_mean_golden(case):
    _check(group_mean, case)


@pytest.mark.parametrize("case", GOLDEN["leave_one_out"], ids=lambda case: case["name"])
def test_leave_one_out_golden(case):
    _check(leave_one_out, case)


@pytest.mark.parametrize("case", GOLDEN["kl_in_reward"], ids=lambda case: case["name"])
def test_the_divergence_in_the_reward_is_in_the_baseline(case):
    mask = np.array(case["inputs"]["mask"], bool)
    rewards = on_last_token(np.array(case["inputs"]["rewards"]), mask)
    k1 = np.array(case["inputs"]["k1"])
    shaped = kl_penalty(rewards, k1, np.zeros_like(k1), mask, coef=case["inputs"]["coef"])
    credit = leave_one_out(shaped, mask, np.zeros(len(mask), np.int64))
    np.testing.assert_allclose(credit.advantages, np.where(mask, np.array(case["outputs"])[:, None], 0), rtol=1e-6)


def test_outcome_spreads_the_sum_and_ignores_padding():
    credit = outcome(REWARDS, MASK)
    np.testing.assert_array_equal(credit.advantages, [[1.5, 1.5, 0], [2, 2, 2], [4, 0, 0]])
    assert credit.returns is None


def test_groups_are_told_apart_by_id_wherever_their_rows_stand():
    credit = group_mean(REWARDS, MASK, np.array([8, 2, 8]))
    np.testing.assert_array_equal(credit.advantages, [[-1.25, -1.25, 0], [0, 0, 0], [1.25, 0, 0]])


@pytest.mark.parametrize("estimator", [group_mean, leave_one_out])
def test_a_response_that_lost_its_group_earns_nothing(estimator):
    credit = estimator(np.array([[0.7]]), np.array([[True]]), np.array([0]))
    np.testing.assert_array_equal(credit.advantages, [[0.0]])


@pytest.mark.parametrize("estimator", [group_mean, leave_one_out])
def test_equal_rewards_earn_exactly_nothing_in_float32(estimator):
    rewards = np.full((7, 1), 0.1, np.float32)
    credit = estimator(rewards, np.ones((7, 1), bool), np.zeros(7, np.int64))
    np.testing.assert_array_equal(credit.advantages, 0)
    assert credit.advantages.dtype == np.float32


def test_shapes_are_checked_here():
    with pytest.raises(TypeCheckError):
        outcome(np.zeros((2, 3)), np.zeros((2, 4), bool))


def _check(estimator, case):
    rewards = np.array(case["inputs"]["rewards"], np.float64)[:, None]
    credit = estimator(rewards, np.ones_like(rewards, bool), np.zeros(len(rewards), np.int64))
    np.testing.assert_allclose(credit.advantages[:, 0], case["outputs"], rtol=1e-6, atol=1e-8)
