"""The scale of the credit."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.algorithms.advantages import group_mean, reward_to_go
from pipeline.algorithms.normalizers import NORMALIZERS, group_std, whiten
from pipeline.algorithms.shaping import kl_penalty, on_last_token
from pipeline.algorithms.shelf import Line

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "normalizers.json").read_text())
PRECISION = pytest.mark.parametrize(
    ("dtype", "close"),
    [(np.float64, {"rtol": 1e-6, "atol": 1e-8}), (np.float32, {"rtol": 1e-4, "atol": 1e-6})],
    ids=["float64", "float32"],
)


def golden(section):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in GOLDEN[section]])


def _settings(inputs):
    return {name: inputs[name] for name in ("ddof", "eps", "center", "over") if name in inputs}


@golden("group_std")
@PRECISION
def test_group_mean_then_group_std_is_grpo(case, dtype, close):
    rewards = np.array(case["inputs"]["rewards"], dtype)[:, None]
    mask, group = np.ones_like(rewards, bool), np.zeros(len(rewards), np.int64)
    credit = group_mean(rewards, mask, group)
    scaled = group_std(credit.advantages, mask, group, **_settings(case["inputs"]))
    np.testing.assert_allclose(scaled[:, 0], case["outputs"], **close)
    assert scaled.dtype == dtype


@golden("whiten")
@PRECISION
def test_whiten_golden(case, dtype, close):
    inputs = case["inputs"]
    whitened = whiten(np.array(inputs["advantages"], dtype), np.array(inputs["mask"], bool), **_settings(inputs))
    np.testing.assert_allclose(whitened, case["outputs"], **close)
    assert whitened.dtype == dtype


@golden("reinforce_pp")
@PRECISION
def test_whitened_rewards_to_go_with_their_divergence_golden(case, dtype, close):
    inputs, expected = case["inputs"], case["outputs"]
    mask, k1 = np.array(inputs["mask"], bool), np.array(inputs["k1"], dtype)
    rewards = on_last_token(np.array(inputs["rewards"], dtype), mask)
    shaped = kl_penalty(rewards, k1, np.zeros_like(k1), mask, coef=inputs["coef"])
    np.testing.assert_allclose(shaped, expected.get("shaped", shaped), **close)
    credit = reward_to_go(shaped, mask, gamma=inputs["gamma"])
    np.testing.assert_allclose(credit.returns, expected["returns"], **close)
    whitened = whiten(credit.advantages, mask, **_settings(inputs))
    np.testing.assert_allclose(whitened, expected["advantages"], **close)


@golden("reinforce_pp_baseline")
@PRECISION
def test_group_mean_whitened_over_the_batch_golden(case, dtype, close):
    inputs, expected = case["inputs"], case["outputs"]
    mask = np.array(inputs["mask"], bool)
    rewards = on_last_token(np.array(inputs["rewards"], dtype), mask)
    credit = group_mean(rewards, mask, np.array(inputs["group"])).advantages
    np.testing.assert_allclose(credit[:, 0], expected["centred"], **close)
    np.testing.assert_allclose(credit[mask].mean(), expected["token_mean"], **close)
    np.testing.assert_allclose(whiten(credit, mask, **_settings(inputs)), expected["advantages"], **close)


def test_group_std_takes_the_mean_of_a_row_whose_credit_varies():
    advantages = np.array([[2.0, 4.0], [1.0, 9.0]])
    mask = np.array([[True, True], [True, False]])
    scaled = group_std(advantages, mask, np.zeros(2, np.int64), ddof=0, eps=0.0)
    np.testing.assert_allclose(scaled, [[2.0, 4.0], [1.0, 0.0]])


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_rewards_and_lost_groups_give_nothing_with_any_eps(eps):
    scaled = group_std(np.zeros((3, 1)), np.ones((3, 1), bool), np.array([0, 0, 1]), eps=eps)
    np.testing.assert_array_equal(scaled, 0)


@pytest.mark.parametrize("over", ["tokens", "responses"])
def test_whiten_of_no_or_one_token_is_nothing(over):
    np.testing.assert_array_equal(whiten(np.ones((1, 2)), np.zeros((1, 2), bool), over=over), np.zeros((1, 2)))
    np.testing.assert_array_equal(whiten(np.ones((1, 1)), np.ones((1, 1), bool), over=over), np.zeros((1, 1)))


def test_a_mean_that_is_kept_stays_where_there_is_nothing_to_scale():
    np.testing.assert_array_equal(whiten(np.full((1, 2), 3.0), np.ones((1, 2), bool), center=False), [[3.0, 3.0]])


@pytest.mark.parametrize("over", ["tokens", "responses"])
@pytest.mark.parametrize("center", [True, False])
def test_what_is_gathered_over_lots_whitens_each_like_the_whole(over, center):
    random = np.random.default_rng(0)
    advantages, mask = random.normal(2.0, 3.0, (40, 6)).astype(np.float32), random.random((40, 6)) < 0.7
    piece = NORMALIZERS.take(Line(kind="whiten", over=over, center=center, ddof=0))
    whole = piece({"advantages": advantages, "mask": mask})
    lots = [{"advantages": advantages[rows], "mask": mask[rows]} for rows in (slice(0, 3), slice(3, 31), slice(31, 40))]
    gathered = piece.gather(lots[0]) + piece.gather(lots[1]) + piece.gather(lots[2])
    np.testing.assert_allclose(np.concatenate([piece(lot, gathered) for lot in lots]), whole, rtol=1e-6)
    alone = {"advantages": advantages, "mask": mask}
    np.testing.assert_array_equal(piece(alone, piece.gather(alone)), whole)


def test_statistics_of_groups_are_not_gathered():
    piece = NORMALIZERS.take(Line(kind="group_std"))
    assert piece.card.gather is None and piece.gather({}) is None
    assert NORMALIZERS.take(Line(kind="whiten")).needs == ("advantages", "mask")
