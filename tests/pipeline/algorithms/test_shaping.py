"""What is added to the reward of each token."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.algorithms.shaping import kl_penalty, missing_end_penalty, on_last_token, overlong_penalty

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "shaping.json").read_text())
MASK = np.array([[True, True, False], [True, True, True], [False, False, False]])


def test_the_reward_sits_on_the_last_token():
    placed = on_last_token(np.array([2.0, 3.0, 4.0]), MASK)
    np.testing.assert_array_equal(placed, [[0, 2, 0], [0, 0, 3], [0, 0, 0]])


@pytest.mark.parametrize("case", GOLDEN["overlong_penalty"], ids=lambda case: case["name"])
@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-8), (np.float32, 1e-5)], ids=["float64", "float32"])
def test_overlong_penalty_golden(case, dtype, atol):
    lengths = np.array(case["inputs"]["lengths"])
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    rewards = on_last_token(np.ones(len(lengths), dtype), mask)
    shaped = overlong_penalty(rewards, mask, limit=case["inputs"]["limit"], buffer=case["inputs"]["buffer"])
    np.testing.assert_allclose(shaped.sum(axis=1) - 1, case["outputs"], atol=atol)
    last = lengths - 1
    np.testing.assert_allclose(shaped[np.arange(len(lengths)), last] - 1, case["outputs"], atol=atol)
    assert shaped.dtype == dtype


@pytest.mark.parametrize("case", GOLDEN["missing_end_penalty"], ids=lambda case: case["name"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_missing_end_penalty_golden(case, dtype):
    inputs = case["inputs"]
    mask, finished = np.array(inputs["mask"], bool), np.array(inputs["finished"], bool)
    shaped = missing_end_penalty(np.array(inputs["rewards"], dtype), mask, finished, penalty=inputs["penalty"])
    np.testing.assert_array_equal(shaped, case["outputs"])
    assert shaped.dtype == dtype


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", [0.3, -0.1]), ("k2", [0.045, 0.005]), ("k3", [0.040818220682, 0.005170918076])]
)
def test_kl_penalty_is_taken_off_every_response_token(estimator, expected):
    old, ref = np.array([[-1.0, -0.6, 0.0]]), np.array([[-1.3, -0.5, 0.0]])
    rewards = np.array([[0.0, 1.0, 0.0]])
    shaped = kl_penalty(rewards, old, ref, MASK[:1], coef=0.5, estimator=estimator)
    np.testing.assert_allclose(shaped, [[-0.5 * expected[0], 1 - 0.5 * expected[1], 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(rewards, [[0.0, 1.0, 0.0]])


def test_kl_penalty_defaults_to_k1_and_k3_does_not_overflow():
    old, ref = np.array([[-200.0]], np.float32), np.array([[-1.0]], np.float32)
    one, rewards = np.array([[True]]), np.zeros((1, 1), np.float32)
    assert kl_penalty(rewards, old, ref, one, coef=1.0).item() == 199.0
    bounded = kl_penalty(rewards, old, ref, one, coef=1.0, estimator="k3")
    np.testing.assert_allclose(bounded, -(np.exp(20.0) - 21), rtol=1e-6)
    assert bounded.dtype == np.float32
