"""What must hold for any input."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.algorithms.advantages import group_mean, leave_one_out, outcome
from pipeline.algorithms.filters import mixed_outcomes
from pipeline.algorithms.losses import clipped_surrogate, kl, policy_gradient
from pipeline.algorithms.normalizers import group_std, whiten
from pipeline.algorithms.shaping import kl_penalty, on_last_token, overlong_penalty
from pipeline.algorithms.weights import WEIGHTS

UNHURRIED = settings(deadline=None)  # the first call of torch's autograd takes longer than the default deadline
FLOATS = st.floats(-8, 8, allow_subnormal=False)
LOGPROBS = st.floats(-12, 0, allow_subnormal=False)


@dataclass(frozen=True)
class Table:
    """Rows of [B T] columns, right-padded with zeros, in groups of at least two."""

    mask: np.ndarray
    group: np.ndarray
    columns: dict[str, np.ndarray]


@st.composite
def tables(draw, empty_rows=False):
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    group = np.repeat(np.arange(len(sizes)), sizes)
    lengths = np.array(draw(st.lists(st.integers(0 if empty_rows else 1, 5), min_size=len(group), max_size=len(group))))
    mask = np.arange(max(lengths.max(), 1))[None, :] < lengths[:, None]
    columns = {}
    for name, values in (("rewards", FLOATS), ("old_logprobs", LOGPROBS), ("ref_logprobs", LOGPROBS)):
        column = np.zeros(mask.shape)
        column[mask] = draw(st.lists(values, min_size=int(mask.sum()), max_size=int(mask.sum())))
        columns[name] = column
    return Table(mask, group, columns)


def _numpy_results(table):
    """What every NumPy piece that returns tokens says of the table."""
    rewards, mask, group = table.columns["rewards"], table.mask, table.group
    old, ref = table.columns["old_logprobs"], table.columns["ref_logprobs"]
    return {
        "on_last_token": on_last_token(rewards.sum(axis=1), mask),
        **{k: kl_penalty(rewards, old, ref, mask, coef=0.1, estimator=k) for k in ("k1", "k2", "k3")},
        "overlong_penalty": overlong_penalty(rewards, mask, limit=4, buffer=2),
        "outcome": outcome(rewards, mask).advantages,
        "group_mean": group_mean(rewards, mask, group).advantages,
        "leave_one_out": leave_one_out(rewards, mask, group).advantages,
        "group_std": group_std(rewards, mask, group, eps=1.0),
        "whiten": whiten(rewards, mask, eps=1.0),
        **{name: weigh(torch.from_numpy(mask)).numpy() for name, weigh in WEIGHTS.items()},
    }


@UNHURRIED
@given(tables())
def test_group_mean_sums_to_nothing_and_leave_one_out_is_its_multiple(table):
    rewards, first = table.columns["rewards"], table.mask.argmax(axis=1)
    rows = np.arange(len(table.group))
    centred = group_mean(rewards, table.mask, table.group).advantages[rows, first]
    others = leave_one_out(rewards, table.mask, table.group).advantages[rows, first]
    sizes = np.bincount(table.group)
    np.testing.assert_allclose(np.bincount(table.group, weights=centred), 0, atol=1e-9)
    np.testing.assert_allclose(others, (centred * (sizes / (sizes - 1))[table.group]), atol=1e-9)


@UNHURRIED
@given(tables())
def test_group_std_leaves_every_group_with_deviation_one_or_nothing(table):
    rewards = on_last_token(np.round(table.columns["rewards"].sum(axis=1)), table.mask)
    credit = group_mean(rewards, table.mask, table.group).advantages
    scaled = group_std(credit, table.mask, table.group, eps=0.0)[:, 0]
    for one in np.unique(table.group):
        constant = np.ptp(rewards.sum(axis=1)[table.group == one]) == 0
        deviation = scaled[table.group == one].std(ddof=1)
        assert constant or deviation == pytest.approx(1)


@UNHURRIED
@given(tables(), st.sampled_from([0, 1]))
def test_whiten_gives_mean_zero_variance_one_and_doing_it_twice_changes_nothing(table, ddof):
    advantages = np.round(table.columns["rewards"])
    once = whiten(advantages, table.mask, ddof=ddof, eps=1e-12)
    if np.ptp(advantages[table.mask]) > 0:
        assert once[table.mask].mean() == pytest.approx(0, abs=1e-9)
        assert once[table.mask].var(ddof=ddof) == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(whiten(once, table.mask, ddof=ddof, eps=1e-12), once, atol=1e-9)


@UNHURRIED
@given(tables(empty_rows=True), st.integers(1, 3))
def test_padding_changes_nothing(table, more):
    def pad(column):
        return np.pad(column, ((0, 0), (0, more)))

    wider = Table(pad(table.mask), table.group, {name: pad(column) for name, column in table.columns.items()})
    before, after = _numpy_results(table), _numpy_results(wider)
    for name in before:
        np.testing.assert_allclose(after[name], pad(before[name]), atol=1e-12, err_msg=name)


@UNHURRIED
@given(tables(empty_rows=True), st.randoms(use_true_random=False))
def test_permuted_rows_give_permuted_results(table, random):
    order = np.array(random.sample(range(len(table.group)), len(table.group)))
    permuted = Table(table.mask[order], table.group[order], {k: column[order] for k, column in table.columns.items()})
    before, after = _numpy_results(table), _numpy_results(permuted)
    for name in before:
        np.testing.assert_allclose(after[name], before[name][order], atol=1e-9, err_msg=name)


@UNHURRIED
@given(tables(empty_rows=True))
def test_means_have_weights_that_sum_to_one(table):
    mask = torch.from_numpy(table.mask)
    some = float(bool(mask.any()))
    assert WEIGHTS["token_mean"](mask).sum().item() == pytest.approx(some, rel=1e-5)
    assert WEIGHTS["sequence_mean"](mask).sum().item() == pytest.approx(some, rel=1e-5)


@UNHURRIED
@given(tables(empty_rows=True), st.integers(1, 4), st.sampled_from(sorted(WEIGHTS)))
def test_the_split_into_micro_batches_changes_neither_loss_nor_gradient(table, size, name):
    weights = WEIGHTS[name](torch.from_numpy(table.mask))
    advantages, old = torch.from_numpy(table.columns["rewards"]), torch.from_numpy(table.columns["old_logprobs"])
    start = torch.from_numpy(table.columns["ref_logprobs"])

    def step(rows_at_once):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        total = 0.0
        for rows in torch.arange(len(start)).split(rows_at_once):
            token_loss = clipped_surrogate(
                scale * start[rows], old[rows], advantages[rows], clip_low=0.2, clip_high=0.28
            )
            loss = (weights[rows] * token_loss).sum()
            loss.backward()
            total += loss.item()
        return total, scale.grad.item()

    assert step(size) == pytest.approx(step(len(start)), rel=1e-9, abs=1e-9)


def _surrogate(table, clip_low, clip_high):
    logprobs = torch.from_numpy(table.columns["ref_logprobs"]).requires_grad_()
    old, advantages = torch.from_numpy(table.columns["old_logprobs"]), torch.from_numpy(table.columns["rewards"])
    loss = clipped_surrogate(logprobs, old, advantages, clip_low=clip_low, clip_high=clip_high)
    return loss, advantages * torch.exp(logprobs.detach() - old)


@UNHURRIED
@given(tables())
def test_at_ratio_one_the_clipped_surrogate_has_the_gradient_of_the_policy_gradient(table):
    logprobs = torch.from_numpy(table.columns["old_logprobs"]).requires_grad_()
    advantages = torch.from_numpy(table.columns["rewards"])
    clipped = clipped_surrogate(logprobs, logprobs.detach(), advantages, clip_low=0.2, clip_high=0.28)
    plain = policy_gradient(logprobs, advantages)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logprobs)[0] for loss in (clipped, plain)))


@UNHURRIED
@given(tables())
def test_without_bounds_the_surrogate_is_the_importance_weighted_objective(table):
    loss, objective = _surrogate(table, 1.0, float("inf"))
    torch.testing.assert_close(-loss.detach(), objective)


@UNHURRIED
@given(tables())
def test_the_clipped_objective_is_never_above_the_unclipped_one(table):
    loss, objective = _surrogate(table, 0.2, 0.28)
    assert (-loss.detach() <= objective + 1e-9).all()


@UNHURRIED
@given(tables())
def test_k3_is_never_negative_and_all_estimators_vanish_only_where_nothing_differs(table):
    logprobs = torch.from_numpy(np.round(table.columns["old_logprobs"], 3))
    ref = torch.from_numpy(np.round(table.columns["ref_logprobs"], 3))
    assert (kl(logprobs, ref, estimator="k3") >= 0).all()
    for estimator in ("k1", "k2", "k3"):
        assert torch.equal(kl(logprobs, ref, estimator=estimator) == 0, logprobs == ref)


@UNHURRIED
@given(st.integers(1, 40), st.integers(1, 40))
def test_overlong_penalty_falls_from_nothing_to_minus_one_without_a_jump(limit, buffer):
    buffer = min(buffer, limit)
    lengths = np.arange(1, limit + 10)
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    penalty = overlong_penalty(np.zeros(mask.shape), mask, limit=limit, buffer=buffer).sum(axis=1)
    assert penalty.min() >= -1
    assert penalty.max() <= 0
    assert (np.diff(penalty) <= 0).all()
    assert np.abs(np.diff(penalty)).max() <= 1 / buffer + 1e-12
    assert (penalty[lengths <= limit - buffer] == 0).all()
    assert (penalty[lengths >= limit] == -1).all()


@UNHURRIED
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, np.nan]), min_size=1, max_size=5), min_size=1, max_size=6))
def test_mixed_outcomes_keeps_no_constant_group_and_drops_no_mixed_one(groups):
    verdicts = np.concatenate([np.array(rows) for rows in groups])
    group = np.repeat(np.arange(len(groups)), [len(rows) for rows in groups])
    expected = [{0.0, 1.0} <= set(rows) for rows in groups]
    np.testing.assert_array_equal(mixed_outcomes(verdicts, group).keep, np.array(expected)[group])
