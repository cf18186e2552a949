"""What must hold of losses and weights for any input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, pad

from pipeline.algorithms.losses import (
    clipped_surrogate,
    entropy,
    kl,
    nll,
    pairs,
    policy_gradient,
    ranking,
    value_clipped,
    value_squared,
)
from pipeline.algorithms.weights import WEIGHTS, sequence_mean, sequence_sum

UNHURRIED = settings(deadline=None)  # the first call of torch's autograd takes longer than the default deadline
FLOATS = st.floats(-8, 8, allow_subnormal=False)
SMALL = st.floats(-1, 1, allow_subnormal=False)  # the ratio of five tokens is then no larger than exp(10)
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


@st.composite
def columns(draw, *names, values=FLOATS, widest=5, empty_rows=False):
    """Right-padded columns [B T] of float64, with `mask` and `group`."""
    count, longest = draw(st.integers(1, 6)), draw(st.integers(1, widest))
    lengths = draw(st.lists(st.integers(0 if empty_rows else 1, longest), min_size=count, max_size=count))
    mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    made = {"mask": mask, "group": torch.tensor(draw(st.lists(st.integers(-2, 2), min_size=count, max_size=count)))}
    for name in names:
        drawn = torch.tensor(draw(st.lists(values, min_size=mask.numel(), max_size=mask.numel())), dtype=torch.float64)
        made[name] = torch.where(mask, drawn.reshape(mask.shape), 0)
    return made


@st.composite
def rankings(draw):
    """Scores, ranks and mask [N K], ties and missing responses among them."""
    rows, k = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    size = {"min_size": rows * k, "max_size": rows * k}
    scores = torch.tensor(draw(st.lists(FLOATS, **size)), dtype=torch.float64).reshape(rows, k)
    ranks = torch.tensor(draw(st.lists(st.integers(0, k), **size))).reshape(rows, k)
    return scores, ranks, torch.tensor(draw(st.lists(st.booleans(), **size))).reshape(rows, k)


def _with_gradient(loss, argument):
    argument = argument.clone().requires_grad_()
    value = loss(argument)
    return value.detach(), torch.autograd.grad(value.sum(), argument)[0]


@UNHURRIED
@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=4), st.booleans())
def test_ranking_two_is_the_logistic_loss_of_the_difference(scores, first_is_better):
    made = torch.tensor(scores, dtype=torch.float64)
    ranks = torch.tensor([[0, 1] if first_is_better else [1, 0]] * len(scores))
    lead = made[:, 0] - made[:, 1] if first_is_better else made[:, 1] - made[:, 0]
    torch.testing.assert_close(ranking(made, ranks, torch.ones_like(made, dtype=torch.bool)), -logsigmoid(lead))


@UNHURRIED
@given(rankings(), FLOATS)
def test_shifting_all_scores_of_a_prompt_changes_neither_ranking_loss_nor_gradient(ranked, shift):
    scores, ranks, mask = ranked
    moved = scores.clone()
    moved[0] += shift
    before, after = (_with_gradient(lambda s: ranking(s, ranks, mask), start) for start in (scores, moved))
    torch.testing.assert_close(before, after)


@UNHURRIED
@given(rankings(), st.randoms(use_true_random=False))
def test_the_order_of_responses_changes_no_ranking_loss(ranked, random):
    order = random.sample(range(ranked[0].shape[1]), ranked[0].shape[1])
    before, after = ranking(*ranked, center=0.1), ranking(*(column[:, order] for column in ranked), center=0.1)
    torch.testing.assert_close(before, after)


@UNHURRIED
@given(rankings(), st.integers(1, 2))
def test_places_without_a_response_change_no_ranking_loss(ranked, more):
    wider = [pad(column, (0, more)) for column in ranked]
    torch.testing.assert_close(ranking(*ranked, center=0.1), ranking(*wider, center=0.1))


@UNHURRIED
@given(rankings())
def test_of_two_ranked_responses_one_is_better_and_of_two_tied_ones_none(ranked):
    _, ranks, mask = ranked
    compared = pairs(ranks, mask)
    both = mask[:, :, None] & mask[:, None, :]
    assert not (compared & compared.mT).any()
    assert torch.equal(compared | compared.mT, both & (ranks[:, :, None] != ranks[:, None, :]))


@UNHURRIED
@given(columns("values", "old_values", "returns"), st.floats(0.01, 2))
def test_value_clipped_is_never_below_value_squared_and_equals_it_inside_the_clip(table, clip):
    values, old, returns = (table[name] for name in ("values", "old_values", "returns"))
    clipped, squared = value_clipped(values, old, returns, clip=clip), value_squared(values, returns)
    inside = (values >= old - clip) & (values <= old + clip)
    assert (clipped >= squared).all()
    assert torch.equal(clipped[inside], squared[inside])


@UNHURRIED
@given(columns("values", "returns"), st.floats(0.01, 2))
def test_at_the_old_values_both_value_losses_have_the_same_gradient(table, clip):
    old, returns = table["values"], table["returns"]
    clipped = _with_gradient(lambda values: value_clipped(values, old, returns, clip=clip), old)
    torch.testing.assert_close(clipped, _with_gradient(lambda values: value_squared(values, returns), old))


@UNHURRIED
@given(columns("logprobs", "advantages"))
def test_at_ratio_one_the_response_ratio_makes_a_response_one_action(table):
    mask, group = table["mask"], table["group"]
    advantages = torch.where(mask, table["advantages"][:, :1], 0)  # one credit per response
    old = table["logprobs"]

    def surrogate(logprobs):
        loss = clipped_surrogate(logprobs, old, advantages, mask, ratio="response", **CLIPS)
        return sequence_mean(mask, group) * loss

    def plain(logprobs):
        return sequence_sum(mask, group) * policy_gradient(logprobs, advantages)

    gradients = [_with_gradient(loss, old)[1] for loss in (surrogate, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # weights are float32


@UNHURRIED
@given(columns("logprobs", "old_logprobs", "advantages", widest=1))
def test_the_response_ratio_of_one_token_is_its_token_ratio(table):
    arguments = [table[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")]
    by_token, by_response = (clipped_surrogate(*arguments, ratio=ratio, **CLIPS) for ratio in ("token", "response"))
    assert torch.equal(by_token, by_response)


@UNHURRIED
@given(columns(empty_rows=True))
def test_weights_of_a_mean_sum_to_one_and_are_nothing_on_padding(table):
    mask, group = table["mask"], table["group"]
    for name, weigh in WEIGHTS.items():
        weights = weigh(mask, group)
        assert torch.equal(weights > 0, mask)
        if name != "sequence_sum":
            torch.testing.assert_close(weights.sum(), mask.any().float())


@UNHURRIED
@given(columns(empty_rows=True))
def test_group_token_mean_gives_every_group_with_a_token_the_same(table):
    mask, group = table["mask"], table["group"]
    weights = WEIGHTS["group_token_mean"](mask, group)
    shares = torch.stack([weights[group == one].sum() for one in group.unique()])
    some = torch.stack([mask[group == one].any() for one in group.unique()])
    torch.testing.assert_close(shares, some / some.sum().clamp(min=1))


@UNHURRIED
@given(columns(empty_rows=True))
def test_group_token_mean_of_one_group_is_the_token_mean(table):
    one = torch.zeros_like(table["group"])
    torch.testing.assert_close(*(WEIGHTS[name](table["mask"], one) for name in ("group_token_mean", "token_mean")))


LOSSES_OF = {
    "clipped_surrogate": lambda lp, c: clipped_surrogate(lp, c["old"], c["advantages"], c["mask"], **CLIPS),
    "clipped_surrogate by response": lambda lp, c: clipped_surrogate(
        lp, c["old"], c["advantages"], c["mask"], ratio="response", **CLIPS
    ),
    "policy_gradient": lambda lp, c: policy_gradient(lp, c["advantages"]),
    "kl": lambda lp, c: kl(lp, c["old"], estimator="k2"),
    "nll": lambda lp, c: nll(lp),
    "entropy": lambda lp, c: entropy(lp),
    "value_squared": lambda lp, c: value_squared(lp, c["advantages"]),
    "value_clipped": lambda lp, c: value_clipped(lp, c["old"], c["advantages"], clip=0.2),
}


@UNHURRIED
@given(
    columns("start", "old", "advantages", values=SMALL, empty_rows=True),
    st.integers(1, 3),
    st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from(sorted(LOSSES_OF)),
    st.randoms(use_true_random=False),
)
def test_neither_the_split_into_micro_batches_nor_padding_nor_order_changes_loss_or_gradient(
    table, size, weighing, losing, random
):
    weights = WEIGHTS[weighing](table["mask"], table["group"])
    names = [name for name in table if name != "group"]
    rows = random.sample(range(len(weights)), len(weights))

    def step(parts, padding):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            cut = {name: pad(table[name][list(part)], (0, padding)) for name in names}
            shares = pad(weights[list(part)], (0, padding))
            loss = (shares * LOSSES_OF[losing](scale * cut["start"], cut)).sum()
            if loss.requires_grad:
                loss.backward()
            total += loss.detach()
        return total, torch.zeros(()) if scale.grad is None else scale.grad

    whole = step([range(len(weights))], 0)
    dealt = step([rows[first : first + size] for first in range(0, len(rows), size)], size)
    for one, other in zip(whole, dealt, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
