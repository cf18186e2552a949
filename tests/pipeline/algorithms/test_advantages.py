"""From the rewards of tokens to the credit of tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from pipeline.algorithms import advantages as estimators
from pipeline.algorithms import lots
from pipeline.algorithms.advantages import gae, greedy_baseline, group_mean, leave_one_out, outcome, reward_to_go
from pipeline.algorithms.losses import policy_gradient
from pipeline.algorithms.shaping import kl_penalty, on_last_token
from pipeline.algorithms.weights import sequence_sum

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "advantages.json").read_text())
MASK = np.array([[True, True, False], [True, True, True], [True, False, False]])
REWARDS = np.array([[0.5, 1.0, 9.0], [0.0, 0.0, 2.0], [4.0, 9.0, 9.0]])
PRECISION = pytest.mark.parametrize(
    ("dtype", "close"),
    [(np.float64, {"rtol": 1e-6, "atol": 1e-8}), (np.float32, {"rtol": 1e-4, "atol": 1e-6})],
    ids=["float64", "float32"],
)


def golden(section):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in GOLDEN[section]])


def _settings(inputs):
    return {name: inputs[name] for name in ("gamma", "lam", "critic_lam", "adapt") if name in inputs}


def _gae(name, **changes):
    inputs = {**next(case for case in GOLDEN["gae"] if case["name"] == name)["inputs"], **changes}
    columns = (np.array(inputs["rewards"], float), np.array(inputs["values"], float), np.array(inputs["mask"], bool))
    return gae(*columns, **_settings(inputs))


@PRECISION
@pytest.mark.parametrize(
    ("estimator", "case"),
    [
        pytest.param(estimator, case, id=f"{estimator.__name__}-{case['name']}")
        for estimator, section in ((group_mean, "group_mean"), (leave_one_out, "leave_one_out"))
        for case in GOLDEN[section]
    ],
)
def test_group_estimators_golden(estimator, case, dtype, close):
    rewards = np.array(case["inputs"]["rewards"], dtype)[:, None]
    credit = estimator(rewards, np.ones_like(rewards, bool), np.zeros(len(rewards), np.int64))
    np.testing.assert_allclose(credit.advantages[:, 0], case["outputs"], **close)
    assert credit.advantages.dtype == dtype


@golden("kl_in_reward")
@PRECISION
def test_the_divergence_in_the_reward_is_in_the_baseline(case, dtype, close):
    mask = np.array(case["inputs"]["mask"], bool)
    rewards = on_last_token(np.array(case["inputs"]["rewards"], dtype), mask)
    k1 = np.array(case["inputs"]["k1"], dtype)
    shaped = kl_penalty(rewards, k1, np.zeros_like(k1), mask, coef=case["inputs"]["coef"])
    credit = leave_one_out(shaped, mask, np.zeros(len(mask), np.int64))
    np.testing.assert_allclose(credit.advantages, np.where(mask, np.array(case["outputs"])[:, None], 0), **close)


@golden("greedy_baseline")
@PRECISION
def test_greedy_baseline_golden(case, dtype, close):
    inputs, expected = case["inputs"], case["outputs"]
    mask = np.array(inputs["mask"], bool)
    credit = greedy_baseline(
        np.array(inputs["rewards"], dtype), mask, np.array(inputs["greedy"], dtype), credit=inputs["credit"]
    )
    np.testing.assert_allclose(credit.advantages, expected["advantages"], **close)
    assert credit.advantages.dtype == dtype
    if "loss" in expected:
        loss = policy_gradient(torch.tensor(inputs["logprobs"]), torch.from_numpy(credit.advantages))
        weights = sequence_sum(torch.from_numpy(mask), torch.zeros(len(mask), dtype=torch.int64))
        np.testing.assert_allclose(loss, expected["token_loss"], rtol=1e-4)
        np.testing.assert_allclose((weights * loss).sum(), expected["loss"], rtol=1e-4)


@golden("reward_to_go")
@PRECISION
def test_reward_to_go_golden(case, dtype, close):
    inputs = case["inputs"]
    credit = reward_to_go(np.array(inputs["rewards"], dtype), np.array(inputs["mask"], bool), gamma=inputs["gamma"])
    np.testing.assert_allclose(credit.advantages, case["outputs"], **close)
    np.testing.assert_array_equal(credit.returns, credit.advantages)
    assert credit.advantages.dtype == dtype


@golden("gae")
@PRECISION
def test_gae_golden(case, dtype, close):
    inputs, expected = case["inputs"], case["outputs"]
    rewards, values = np.array(inputs["rewards"], dtype), np.array(inputs["values"], dtype)
    credit = gae(rewards, values, np.array(inputs["mask"], bool), **_settings(inputs))
    np.testing.assert_allclose(credit.advantages, expected["advantages"], **close)
    assert credit.advantages.dtype == credit.returns.dtype == dtype
    if "returns" in expected:
        np.testing.assert_allclose(credit.returns, expected["returns"], **close)


@golden("gae_with_divergence")
@PRECISION
def test_gae_of_a_reward_with_divergence_golden(case, dtype, close):
    inputs, expected = case["inputs"], case["outputs"]
    old, ref, values = (np.array(inputs[name], dtype) for name in ("old_logprobs", "ref_logprobs", "values"))
    mask = np.ones_like(old, bool)
    rewards = on_last_token(np.array(inputs["rewards"], dtype), mask)
    shaped = kl_penalty(rewards, old, ref, mask, coef=inputs["coef"])
    np.testing.assert_allclose(shaped, expected["shaped"], **close)
    np.testing.assert_allclose(outcome(shaped, mask).advantages[:, 0], expected["sum"], **close)
    credit = gae(shaped, values, mask, **_settings(inputs))
    np.testing.assert_allclose(credit.advantages, expected["advantages"], **close)
    np.testing.assert_allclose(credit.returns, expected["returns"], **close)


@golden("gae_decay")
@PRECISION
def test_what_reaches_a_token_from_a_reward_far_away_golden(case, dtype, close):
    tokens, expected = case["inputs"]["tokens"], case["outputs"]
    mask = np.ones((1, tokens), bool)
    rewards = on_last_token(np.ones(1, dtype), mask)
    advantages = gae(rewards, np.zeros_like(rewards), mask, lam=case["inputs"]["lam"]).advantages[0]
    places = tokens - 1 - np.array(expected["distance"])
    np.testing.assert_allclose(advantages[places], expected["advantages"], rtol=close["rtol"])


@golden("adapted_lambda")
@PRECISION
def test_adapted_lambda_golden(case, dtype, close):
    lengths, expected = np.array(case["inputs"]["lengths"]), case["outputs"]
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    rewards = on_last_token(np.ones(len(lengths), dtype), mask)
    advantages = gae(rewards, np.zeros_like(rewards), mask, adapt=case["inputs"]["adapt"]).advantages
    longer = lengths > 1
    lam = advantages[np.flatnonzero(longer), lengths[longer] - 2]  # one token before the only TD error, which is 1
    np.testing.assert_allclose(lam, np.array(expected["lam"])[longer], **close)
    np.testing.assert_allclose(advantages.sum(axis=1), expected["coefficients"], rtol=close["rtol"])
    power = lam.astype(np.float64) * advantages[longer, 0]
    np.testing.assert_allclose(power, np.array(expected["lam_to_the_length"])[longer], rtol=close["rtol"])


def test_reversed_lambdas_are_not_the_decoupled_ones():
    decoupled, swapped = _gae("decoupled"), _gae("reversed")
    assert np.abs(decoupled.advantages - swapped.advantages).max() > 0.1
    assert np.abs(decoupled.returns - swapped.returns).max() > 0.1


def test_the_critic_has_the_lambda_of_the_advantages_unless_told():
    for name in ("lam_0.95", "adapt_per_response"):
        inputs = next(case for case in GOLDEN["gae"] if case["name"] == name)["inputs"]
        credit, mask = _gae(name), np.array(inputs["mask"], bool)
        expected = np.where(mask, credit.advantages + np.array(inputs["values"]), 0)
        np.testing.assert_allclose(credit.returns, expected)
    assert (_gae("lam_0.95", critic_lam=0.0).returns != _gae("lam_0.95").returns).any()


def test_adapt_replaces_lam():
    np.testing.assert_array_equal(
        _gae("adapt_per_response", lam=0.3).advantages, _gae("adapt_per_response", lam=0.9).advantages
    )


def test_what_stands_in_padding_does_not_matter_even_if_it_is_no_number():
    inputs = next(case for case in GOLDEN["gae"] if case["name"] == "padding_with_garbage")["inputs"]
    broken = np.where(inputs["mask"], inputs["values"], np.nan).tolist()
    clean, dirty = _gae("padding_with_garbage"), _gae("padding_with_garbage", values=broken)
    np.testing.assert_array_equal(clean.advantages, dirty.advantages)
    np.testing.assert_array_equal(clean.returns, dirty.returns)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("with_values", [True, False])
def test_without_holes_the_short_way_comes_to_the_same_bits(gamma, lam, with_values):
    random = np.random.default_rng(0)
    rewards, values = random.normal(size=(2, 50, 9)).astype(np.float32)
    mask = np.arange(9) < random.integers(0, 10, 50)[:, None]
    decay = gamma * np.full(50, lam)
    values = values if with_values else np.zeros_like(rewards)
    made = estimators._estimated(rewards, values if with_values else None, mask, gamma, np.full(50, lam))
    np.testing.assert_array_equal(made, estimators._over_holes(rewards, values, mask, gamma, decay))


@pytest.mark.parametrize("estimator", ["gae", "to_go", "greedy"])
def test_the_size_of_lots_changes_no_bit(estimator, monkeypatch):
    random = np.random.default_rng(0)
    rewards, values = random.normal(size=(2, 50, 9)).astype(np.float32)
    mask, greedy = random.random((50, 9)) < 0.8, random.random(50).astype(np.float32)  # some rows have holes
    mask[:20] = np.arange(9) < random.integers(1, 10, 20)[:, None]
    call = {
        "gae": lambda: gae(rewards, values, mask, adapt=0.5, critic_lam=1.0),
        "to_go": lambda: reward_to_go(rewards, mask, gamma=0.9),
        "greedy": lambda: greedy_baseline(rewards, mask, greedy, credit="to_go"),
    }[estimator]
    whole = call()
    monkeypatch.setattr(lots, "ELEMENTS", 27)
    cut = call()
    np.testing.assert_array_equal(cut.advantages, whole.advantages)
    np.testing.assert_array_equal(cut.returns, whole.returns)


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [3, 7, 16])
@pytest.mark.parametrize("estimator", [group_mean, leave_one_out])
def test_equal_rewards_earn_exactly_nothing(estimator, count, dtype):
    rewards = np.full((count, 1), 0.1, dtype)
    credit = estimator(rewards, np.ones((count, 1), bool), np.zeros(count, np.int64))
    np.testing.assert_array_equal(credit.advantages, 0)
    assert credit.advantages.dtype == dtype


def test_shapes_are_checked_here():
    with pytest.raises(TypeCheckError):
        outcome(np.zeros((2, 3)), np.zeros((2, 4), bool))
