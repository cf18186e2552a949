"""The scale of the credit."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.algorithms.advantages import group_mean
from pipeline.algorithms.normalizers import group_std, whiten

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "normalizers.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["group_std"], ids=lambda case: case["name"])
def test_group_mean_then_group_std_is_grpo(case):
    rewards = np.array(case["inputs"]["rewards"], np.float64)[:, None]
    mask, group = np.ones_like(rewards, bool), np.zeros(len(rewards), np.int64)
    credit = group_mean(rewards, mask, group)
    scaled = group_std(credit.advantages, mask, group, ddof=case["inputs"]["ddof"], eps=case["inputs"]["eps"])
    np.testing.assert_allclose(scaled[:, 0], case["outputs"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", GOLDEN["whiten"], ids=lambda case: case["name"])
def test_whiten_golden(case):
    mask = np.array(case["inputs"]["mask"], bool)
    whitened = whiten(np.array(case["inputs"]["advantages"]), mask, ddof=case["inputs"]["ddof"])
    np.testing.assert_allclose(whitened, case["outputs"], rtol=1e-6, atol=1e-8)


def test_group_std_takes_the_mean_of_a_row_whose_credit_varies():
    advantages = np.array([[2.0, 4.0], [1.0, 9.0]])
    mask = np.array([[True, True], [True, False]])
    scaled = group_std(advantages, mask, np.zeros(2, np.int64), ddof=0, eps=0.0)
    np.testing.assert_allclose(scaled, [[2.0, 4.0], [1.0, 0.0]])


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_rewards_and_lost_groups_give_nothing_with_any_eps(eps):
    scaled = group_std(np.zeros((3, 1)), np.ones((3, 1), bool), np.array([0, 0, 1]), eps=eps)
    np.testing.assert_array_equal(scaled, 0)


def test_whiten_of_no_or_one_token_is_nothing():
    np.testing.assert_array_equal(whiten(np.ones((1, 2)), np.zeros((1, 2), bool)), np.zeros((1, 2)))
    np.testing.assert_array_equal(whiten(np.ones((1, 1)), np.ones((1, 1), bool)), np.zeros((1, 1)))


def test_float32_stays_float32():
    advantages, mask = np.array([[1.0], [2.0]], np.float32), np.ones((2, 1), bool)
    assert whiten(advantages, mask).dtype == np.float32
    assert group_std(advantages, mask, np.zeros(2, np.int64)).dtype == np.float32
