"""What must hold for any input."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.algorithms.advantages import gae, greedy_baseline, group_mean, leave_one_out, outcome, reward_to_go
from pipeline.algorithms.filters import drawn, mixed_outcomes
from pipeline.algorithms.importance import sequence_truncated, token_truncated
from pipeline.algorithms.labels import majority_vote, self_confidence
from pipeline.algorithms.losses import clipped_surrogate, kl, policy_gradient
from pipeline.algorithms.normalizers import group_std, whiten
from pipeline.algorithms.shaping import kl_penalty, missing_end_penalty, on_last_token, overlong_penalty
from pipeline.algorithms.weights import WEIGHTS

UNHURRIED = settings(deadline=None)  # the first call of torch's autograd takes longer than the default deadline
FLOATS = st.floats(-8, 8, allow_subnormal=False)
LOGPROBS = st.floats(-12, 0, allow_subnormal=False)
SHARES = st.floats(0, 1, allow_subnormal=False)
COLUMNS = {
    "rewards": FLOATS,
    "values": FLOATS,
    "old_logprobs": LOGPROBS,
    "ref_logprobs": LOGPROBS,
    "sampler_logprobs": LOGPROBS,
}


@dataclass(frozen=True)
class Table:
    """Rows of [B T] columns, right-padded with zeros, in groups of at least two, with [B] columns beside them."""

    mask: np.ndarray
    group: np.ndarray
    columns: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]

    def with_padding(self, more):
        columns = {name: _padded(column, more) for name, column in self.columns.items()}
        return Table(_padded(self.mask, more), self.group, columns, self.rows)

    def in_order(self, order):
        columns, rows = ({k: column[order] for k, column in part.items()} for part in (self.columns, self.rows))
        return Table(self.mask[order], self.group[order], columns, rows)


def _padded(column, more):
    return np.pad(column, ((0, 0), (0, more)))


@st.composite
def tables(draw, empty_rows=False, holes=False):
    """`holes`: some tokens inside responses are masked, with numbers that must not matter."""
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    group = np.repeat(np.arange(len(sizes)), sizes)
    count = len(group)
    lengths = np.array(draw(st.lists(st.integers(0 if empty_rows else 1, 5), min_size=count, max_size=count)))
    written = np.arange(max(lengths.max(), 1))[None, :] < lengths[:, None]
    mask = written.copy()
    if holes:
        mask &= np.array(draw(st.lists(st.booleans(), min_size=mask.size, max_size=mask.size))).reshape(mask.shape)
    columns = {}
    for name, values in COLUMNS.items():
        column = np.zeros(mask.shape)
        column[written] = draw(st.lists(values, min_size=int(written.sum()), max_size=int(written.sum())))
        columns[name] = column
    greedy = np.array(draw(st.lists(FLOATS, min_size=len(sizes), max_size=len(sizes))))
    rows = {
        "greedy": greedy[group],
        "finished": np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        "sample": np.concatenate([np.arange(size) for size in sizes]) - draw(st.integers(0, 1)),
        "answers": np.array(draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))),
        "lottery": np.array(draw(st.lists(SHARES, min_size=count, max_size=count))),
    }
    return Table(mask, group, columns, rows)


def _token_results(table):
    """What every NumPy piece, and every weighting, that returns tokens says of the table."""
    mask, group, rows = table.mask, table.group, table.rows
    rewards, values, old, ref, sampler = (table.columns[name] for name in COLUMNS)
    estimated = {
        "gae": gae(rewards, values, mask, gamma=0.9, lam=0.8, critic_lam=0.5),
        "adapted gae": gae(rewards, values, mask, adapt=0.3),
        "reward_to_go": reward_to_go(rewards, mask, gamma=0.9),
    }
    return {
        "on_last_token": on_last_token(rewards.sum(axis=1), mask),
        **{k: kl_penalty(rewards, old, ref, mask, coef=0.1, estimator=k) for k in ("k1", "k2", "k3")},
        "overlong_penalty": overlong_penalty(rewards, mask, limit=4, buffer=2),
        "missing_end_penalty": missing_end_penalty(rewards, mask, rows["finished"], penalty=0.5),
        "outcome": outcome(rewards, mask).advantages,
        "group_mean": group_mean(rewards, mask, group).advantages,
        "leave_one_out": leave_one_out(rewards, mask, group).advantages,
        **{f"greedy_baseline {credit}": greedy_baseline(rewards, mask, rows["greedy"], credit=credit).advantages
           for credit in ("response", "to_go")},
        **{name: credit.advantages for name, credit in estimated.items()},
        **{f"returns of {name}": credit.returns for name, credit in estimated.items()},
        "group_std": group_std(rewards, mask, group, eps=1.0),
        "whiten": whiten(rewards, mask, eps=1.0),
        "whiten uncentred": whiten(rewards, mask, eps=1.0, center=False),
        "whiten over responses": whiten(rewards, mask, eps=1.0, over="responses"),
        "token_truncated": token_truncated(old, sampler, mask),
        "sequence_truncated": sequence_truncated(old, sampler, mask),
        **{name: weigh(torch.from_numpy(mask), torch.from_numpy(group)).numpy() for name, weigh in WEIGHTS.items()},
    }  # fmt: skip


def _row_results(table):
    """What every NumPy piece that returns rows says of the table."""
    rows, group, verdicts = table.rows, table.group, table.rows["finished"].astype(float)
    voted = majority_vote(rows["answers"], group, rows["sample"])
    return {
        "votes": voted.rewards,
        "target": voted.target,
        "vote_share": voted.vote_share,
        "self_confidence": self_confidence(table.columns["sampler_logprobs"], table.mask).rewards,
        "mixed_outcomes": mixed_outcomes(verdicts, group).keep,
        "drawn": drawn(rows["sample"], group, rows["lottery"], n=2).keep,
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
@given(tables(), st.sampled_from([0, 1]))
def test_whiten_over_responses_gives_their_means_mean_zero_and_variance_one(table, ddof):
    advantages = np.round(table.columns["rewards"])
    means = _response_means(advantages, table.mask)
    scaled = _response_means(whiten(advantages, table.mask, ddof=ddof, eps=1e-12, over="responses"), table.mask)
    assert scaled.mean() == pytest.approx(0, abs=1e-6)
    assert np.ptp(means) < 1e-9 or scaled.var(ddof=ddof) == pytest.approx(1, abs=1e-6)


@UNHURRIED
@given(tables(), st.sampled_from(["tokens", "responses"]))
def test_without_centring_only_the_mean_differs(table, over):
    advantages = table.columns["rewards"]
    kept, centred = (whiten(advantages, table.mask, over=over, center=center)[table.mask] for center in (False, True))
    counted = advantages[table.mask] if over == "tokens" else _response_means(advantages, table.mask)
    np.testing.assert_allclose(kept - centred, counted.mean(), atol=1e-6)


def _response_means(advantages, mask):
    return np.where(mask, advantages, 0).sum(axis=1) / mask.sum(axis=1)


@UNHURRIED
@given(tables(empty_rows=True, holes=True), st.integers(1, 3))
def test_padding_changes_nothing(table, more):
    wider = table.with_padding(more)
    before, after = _token_results(table), _token_results(wider)
    for name in before:
        np.testing.assert_allclose(after[name], _padded(before[name], more), atol=1e-12, err_msg=name)
    before, after = _row_results(table), _row_results(wider)
    for name in before:
        np.testing.assert_allclose(after[name], before[name], atol=1e-12, err_msg=name)


@UNHURRIED
@given(tables(empty_rows=True, holes=True), st.randoms(use_true_random=False))
def test_permuted_rows_give_permuted_results(table, random):
    order = np.array(random.sample(range(len(table.group)), len(table.group)))
    permuted = table.in_order(order)
    for results in (_token_results, _row_results):
        before, after = results(table), results(permuted)
        for name in before:
            np.testing.assert_allclose(after[name], before[name][order], atol=1e-9, err_msg=name)


@UNHURRIED
@given(tables(empty_rows=True, holes=True), SHARES, st.sampled_from([None, 0.05, 0.7]), SHARES)
def test_gae_with_a_critics_lambda_of_one_teaches_monte_carlo_returns_whatever_lam_is(table, lam, adapt, gamma):
    rewards, values, mask = table.columns["rewards"], table.columns["values"], table.mask
    credit = gae(rewards, values, mask, gamma=gamma, lam=lam, critic_lam=1.0, adapt=adapt)
    to_go = reward_to_go(rewards, mask, gamma=gamma)
    np.testing.assert_allclose(credit.returns, to_go.returns, atol=1e-9)
    np.testing.assert_array_equal(to_go.returns, to_go.advantages)


@UNHURRIED
@given(tables(empty_rows=True, holes=True), SHARES)
def test_gae_with_lambda_one_is_the_reward_to_go_less_the_value(table, gamma):
    rewards, values, mask = table.columns["rewards"], table.columns["values"], table.mask
    credit, to_go = gae(rewards, values, mask, gamma=gamma, lam=1.0), reward_to_go(rewards, mask, gamma=gamma)
    np.testing.assert_allclose(credit.advantages, np.where(mask, to_go.returns - values, 0), atol=1e-9)
    np.testing.assert_allclose(credit.returns, to_go.returns, atol=1e-9)


@UNHURRIED
@given(tables(empty_rows=True), SHARES)
def test_gae_with_lambda_zero_is_the_error_of_one_step(table, gamma):
    rewards, values, mask = table.columns["rewards"], table.columns["values"], table.mask
    errors = rewards + gamma * np.pad(values, ((0, 0), (0, 1)))[:, 1:] - values
    np.testing.assert_allclose(gae(rewards, values, mask, gamma=gamma, lam=0.0).advantages, errors, atol=1e-12)


@UNHURRIED
@given(tables(empty_rows=True, holes=True), SHARES, SHARES)
def test_holes_are_passed_over_as_if_they_were_not_there(table, gamma, lam):
    rewards, values = table.columns["rewards"], table.columns["values"]
    credit = gae(rewards, values, table.mask, gamma=gamma, lam=lam, critic_lam=0.5)
    for row, mask in enumerate(table.mask):
        alone = np.ones((1, int(mask.sum())), bool)
        short = gae(rewards[[row]][:, mask], values[[row]][:, mask], alone, gamma=gamma, lam=lam, critic_lam=0.5)
        np.testing.assert_allclose(credit.advantages[[row]][:, mask], short.advantages, atol=1e-12)
        np.testing.assert_allclose(credit.returns[[row]][:, mask], short.returns, atol=1e-12)
    assert (credit.advantages[~table.mask] == 0).all()
    assert (credit.returns[~table.mask] == 0).all()


@UNHURRIED
@given(tables(), st.sampled_from([0.05, 0.3, 0.9, 4.0]))
def test_adapt_is_a_fixed_lambda_where_all_lengths_are_equal(table, adapt):
    rewards, values = table.columns["rewards"], table.columns["values"]
    mask, length = np.ones_like(table.mask), table.mask.shape[1]
    adapted, fixed = (
        gae(rewards, values, mask, **setting)
        for setting in ({"adapt": adapt}, {"lam": float(np.clip(1 - 1 / (adapt * length), 0, 1))})
    )
    np.testing.assert_allclose(adapted.advantages, fixed.advantages, atol=1e-12)
    np.testing.assert_allclose(adapted.returns, fixed.returns, atol=1e-12)


@UNHURRIED
@given(tables())
def test_estimated_divergence_in_the_reward_vanishes_only_where_nothing_differs_and_k3_never_rewards(table):
    old, ref = (np.round(table.columns[name], 3) for name in ("old_logprobs", "ref_logprobs"))
    nothing = np.zeros_like(old)
    for estimator in ("k1", "k2", "k3"):
        shaped = kl_penalty(nothing, old, ref, table.mask, coef=1.0, estimator=estimator)
        np.testing.assert_array_equal((shaped == 0)[table.mask], (old == ref)[table.mask])
    assert (shaped <= 0).all()  # k3, the last


@UNHURRIED
@given(tables(empty_rows=True, holes=True), st.floats(1, 5))
def test_importance_weights_are_positive_capped_and_one_where_engine_and_trainer_agree(table, cap):
    old, sampler, mask = table.columns["old_logprobs"], table.columns["sampler_logprobs"], table.mask
    for piece in (token_truncated, sequence_truncated):
        weights = piece(old, sampler, mask, cap=cap)
        assert ((weights > 0) == mask).all()
        assert (weights <= cap).all()
        np.testing.assert_array_equal(piece(old, old, mask, cap=cap), mask)


@UNHURRIED
@given(tables(), st.randoms(use_true_random=False))
def test_the_winner_of_a_vote_is_the_most_frequent_answer_and_of_equals_the_earliest(table, random):
    sample, answers, group = (*(table.rows[name] for name in ("sample", "answers")), table.group)
    names = np.array(random.sample(range(9), 3))  # how the classes are numbered is of no account
    voted = majority_vote(np.where(answers >= 0, names[answers], -1), group, sample)
    for one in np.unique(group):
        votes = {
            int(s): int(a) for s, a in zip(sample[group == one], answers[group == one], strict=True) if a >= 0 <= s
        }
        cast = [votes[s] for s in sorted(votes)]
        winner = max(cast, key=cast.count, default=None)  # of equals max takes the first
        right = answers[group == one] == winner
        np.testing.assert_array_equal(voted.verdicts[group == one], right)
        np.testing.assert_array_equal(voted.target[group == one], -1 if winner is None else names[winner])


@UNHURRIED
@given(tables(), st.integers(1, 5))
def test_drawn_keeps_n_of_every_group_and_the_next_number_keeps_them_too(table, n):
    sample, group, lottery = table.rows["sample"], table.group, table.rows["lottery"]
    kept, more = (drawn(sample, group, lottery, n=count).keep for count in (n, n + 1))
    assert (more >= kept).all()
    assert not kept[sample < 0].any()
    for one in np.unique(group):
        here, out = (group == one) & kept, (group == one) & ~kept & (sample >= 0)
        assert here.sum() == min(n, ((group == one) & (sample >= 0)).sum())
        assert not out.any() or lottery[here].max() <= lottery[out].min()


@UNHURRIED
@given(tables(empty_rows=True))
def test_means_have_weights_that_sum_to_one(table):
    mask, group = torch.from_numpy(table.mask), torch.from_numpy(table.group)
    some = float(bool(mask.any()))
    for name in ("token_mean", "group_token_mean", "sequence_mean"):
        assert WEIGHTS[name](mask, group).sum().item() == pytest.approx(some, rel=1e-5)


@UNHURRIED
@given(tables(empty_rows=True), st.integers(1, 4), st.sampled_from(sorted(WEIGHTS)))
def test_the_split_into_micro_batches_changes_neither_loss_nor_gradient(table, size, name):
    mask = torch.from_numpy(table.mask)
    weights = WEIGHTS[name](mask, torch.from_numpy(table.group))
    advantages, old = torch.from_numpy(table.columns["rewards"]), torch.from_numpy(table.columns["old_logprobs"])
    start = torch.from_numpy(table.columns["ref_logprobs"])

    def step(rows_at_once):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        total = 0.0
        for rows in torch.arange(len(start)).split(rows_at_once):
            token_loss = clipped_surrogate(
                scale * start[rows], old[rows], advantages[rows], mask[rows], clip_low=0.2, clip_high=0.28
            )
            loss = (weights[rows] * token_loss).sum()
            loss.backward()
            total += loss.item()
        return total, scale.grad.item()

    assert step(size) == pytest.approx(step(len(start)), rel=1e-9, abs=1e-9)


def _surrogate(table, clip_low, clip_high):
    logprobs = torch.from_numpy(table.columns["ref_logprobs"]).requires_grad_()
    old, advantages = torch.from_numpy(table.columns["old_logprobs"]), torch.from_numpy(table.columns["rewards"])
    mask = torch.from_numpy(table.mask)
    loss = clipped_surrogate(logprobs, old, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    return loss, advantages * torch.exp(logprobs.detach() - old)


@UNHURRIED
@given(tables())
def test_at_ratio_one_the_clipped_surrogate_has_the_gradient_of_the_policy_gradient(table):
    logprobs = torch.from_numpy(table.columns["old_logprobs"]).requires_grad_()
    advantages = torch.from_numpy(table.columns["rewards"])
    mask = torch.from_numpy(table.mask)
    clipped = clipped_surrogate(logprobs, logprobs.detach(), advantages, mask, clip_low=0.2, clip_high=0.28)
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
