"""A loss per token, and its gradient."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.algorithms.losses import (
    LOSSES,
    clipped_surrogate,
    entropy,
    kl,
    nll,
    pairs,
    policy_gradient,
    ranking,
    ratios,
    reward_bias,
    value_clipped,
    value_squared,
)
from pipeline.algorithms.recipe import KlController
from pipeline.algorithms.weights import sequence_mean, sequence_sum, token_mean

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())


@dataclass(frozen=True)
class Precision:
    """A type of number, and how near to the golden value it must come."""

    dtype: torch.dtype
    rtol: float
    atol: float

    def tensor(self, values, grad=False):
        return torch.tensor(values, dtype=self.dtype).requires_grad_(grad)

    def check(self, actual, expected):
        np.testing.assert_allclose(torch.as_tensor(actual).detach(), expected, rtol=self.rtol, atol=self.atol)


@pytest.fixture(
    params=[Precision(torch.float64, 1e-6, 1e-12), Precision(torch.float32, 1e-4, 1e-7)],
    ids=lambda precision: str(precision.dtype).removeprefix("torch."),
)
def at(request):
    return request.param


def golden(section):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in GOLDEN[section]])


def _everywhere(tensor):
    return torch.ones(tensor.shape, dtype=torch.bool)


def _one_group(tensor):
    return torch.zeros(len(tensor), dtype=torch.int64)


def _row(values):
    return torch.tensor([values], dtype=torch.float64)


@golden("clipped_surrogate")
def test_clipped_surrogate_golden(case, at):
    inputs, expected = case["inputs"], case["outputs"]
    ratio = np.array(inputs["ratio"])
    logprobs = at.tensor([np.log(ratio).tolist()], grad=True)
    advantages = torch.full_like(logprobs, inputs["advantage"], requires_grad=False)
    bounds = {name: inputs[name] for name in ("clip_low", "clip_high", "dual_clip")}
    loss = clipped_surrogate(logprobs, torch.zeros_like(logprobs), advantages, _everywhere(logprobs), **bounds)
    at.check(loss[0], expected["loss"])
    if expected["slope"] is not None:
        loss.sum().backward()
        slope = logprobs.grad[0] / torch.from_numpy(ratio)
        # On a bound itself the slope is a matter of rounding.
        inside = ~np.isclose(ratio, 1 - inputs["clip_low"]) & ~np.isclose(ratio, 1 + inputs["clip_high"])
        at.check(slope[inside], np.array(expected["slope"])[inside])


@golden("log_ratio_limit")
def test_log_ratios_are_bounded(case, at):
    logprobs = at.tensor([case["inputs"]["log_ratio"]], grad=True)
    advantages = torch.full_like(logprobs, -1.0, requires_grad=False)
    loss = clipped_surrogate(
        logprobs, torch.zeros_like(logprobs), advantages, _everywhere(logprobs), clip_low=1.0, clip_high=float("inf")
    )
    np.testing.assert_allclose(loss[0].detach(), case["outputs"]["ratio"], rtol=at.rtol)
    loss.sum().backward()
    np.testing.assert_array_equal(logprobs.grad, 0)


@golden("largest_probability")
def test_a_wider_upper_bound_lets_a_token_become_likelier_before_its_gradient_stops(case, at):
    old = at.tensor([case["inputs"]["old_probability"]]).log()
    largest = at.tensor([case["outputs"]])

    def slope(probability):
        logprobs = probability.log().requires_grad_()
        loss = clipped_surrogate(
            logprobs, old, torch.ones_like(old), _everywhere(old), clip_low=0.2, clip_high=case["inputs"]["clip_high"]
        )
        return torch.autograd.grad(loss.sum(), logprobs)[0]

    assert (slope(largest * 0.9999) < -1).all()
    assert (slope(largest * 1.0001) == 0).all()


@golden("response_ratio")
def test_one_ratio_per_response(case, at):
    inputs, expected = case["inputs"], case["outputs"]
    mask = torch.tensor(inputs["mask"], dtype=torch.bool)
    logprobs, old = at.tensor(inputs["logprobs"]), at.tensor(inputs["old_logprobs"])
    advantages = torch.where(mask, at.tensor(inputs["advantages"])[:, None], 0)
    columns = {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages, "mask": mask}
    settings = {"clip_low": inputs["clip"], "clip_high": inputs["clip"], "ratio": "response"}
    at.check(ratios(logprobs, old, mask, ratio="response"), np.repeat(expected["ratio"], 3).reshape(2, 3))
    loss = clipped_surrogate(*columns.values(), **settings)
    at.check((sequence_mean(mask, _one_group(mask)) * loss).sum(), expected["loss"])


@pytest.mark.parametrize("ratio", ["token", "response"])
def test_padding_has_no_part_in_a_ratio(ratio):
    logprobs, old = _row([-1.0, -2.0, 5.0]).requires_grad_(), _row([-1.1, -1.9, 0.0])
    mask = torch.tensor([[True, True, False]])
    short = ratios(logprobs[:, :2], old[:, :2], mask[:, :2], ratio=ratio)
    long = ratios(logprobs, old, mask, ratio=ratio)[:, :2]
    torch.testing.assert_close(short, long)
    assert torch.autograd.grad(long.sum(), logprobs)[0][0, 2] == 0


@golden("surrogate_and_divergence")
def test_surrogate_and_divergence_summed(case, at):
    inputs, expected = case["inputs"], case["outputs"]
    mask = torch.tensor(inputs["mask"], dtype=torch.bool)
    logprobs, old, ref = (at.tensor(inputs[name]) for name in ("logprobs", "old_logprobs", "ref_logprobs"))
    advantages = torch.where(mask, at.tensor(inputs["advantages"])[:, None], 0)
    surrogate = clipped_surrogate(logprobs, old, advantages, mask, clip_low=inputs["clip"], clip_high=inputs["clip"])
    divergence = kl(logprobs, ref, estimator=inputs["estimator"])
    at.check(divergence, expected["divergence"])
    weights = token_mean(mask, _one_group(mask))
    at.check((weights * (surrogate + inputs["coef"] * divergence)).sum(), expected["loss"])


@golden("kl")
def test_kl_golden(case, at):
    logprobs = at.tensor([case["inputs"]["difference"]], grad=True)
    value = kl(logprobs, torch.zeros_like(logprobs), estimator=case["inputs"]["estimator"])
    at.check(value[0], case["outputs"]["value"])
    value.sum().backward()
    at.check(logprobs.grad[0], case["outputs"]["gradient"])


@golden("kl_two_outcomes")
def test_expected_kl_and_gradient_over_two_tokens(case, at):
    policy, reference = at.tensor([case["inputs"]["policy"]]), at.tensor([case["inputs"]["reference"]])
    logits = policy.log().requires_grad_()
    value = kl(logits.log_softmax(-1), reference.log(), estimator=case["inputs"]["estimator"])
    expected = (policy * value).sum()
    expected.backward()
    at.check(expected, case["outputs"]["value"])
    at.check(logits.grad[0], case["outputs"]["gradient"])


def test_k3_does_not_overflow_in_float32():
    logprobs = torch.tensor([[-200.0]], requires_grad=True)
    value = kl(logprobs, torch.tensor([[-1.0]]), estimator="k3")
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert logprobs.grad.item() == 0


def test_k3_is_exact_for_small_differences_in_float32():
    logprobs = torch.tensor([[-1e-3, 1e-3]])
    value = kl(logprobs, torch.zeros(1, 2), estimator="k3")
    np.testing.assert_allclose(value, [[5.001667e-7, 4.998334e-7]], rtol=1e-3)


@golden("logprob_at_temperature")
def test_nll_of_a_token_at_a_temperature(case, at):
    logits, token = at.tensor(case["inputs"]["logits"]), case["inputs"]["token"]
    logprobs = (logits / case["inputs"]["temperature"]).log_softmax(-1)[None, token : token + 1]
    at.check(nll(logprobs)[0, 0], -case["outputs"])


@golden("nll_of_right_responses")
def test_nll_of_right_responses_has_a_denominator_of_its_own(case, at):
    inputs, expected = case["inputs"], case["outputs"]
    right = torch.tensor(inputs["mask"], dtype=torch.bool) & torch.tensor(inputs["correct"], dtype=torch.bool)[:, None]
    term = (token_mean(right, _one_group(right)) * nll(at.tensor(inputs["logprobs"]))).sum()
    at.check(term, expected["nll"])
    at.check(inputs["surrogate"] + inputs["coef"] * term, expected["loss"])


@golden("documents")
def test_documents_join_the_loss_of_the_same_step(case, at):
    inputs = case["inputs"]
    logprobs = at.tensor([[-inputs["nll"]] * 4], grad=True)
    mean = (token_mean(_everywhere(logprobs), _one_group(logprobs)) * nll(logprobs)).sum()
    total = inputs["surrogate"] + inputs["coef"] * mean
    at.check(total, case["outputs"])
    total.backward()
    at.check(logprobs.grad[0], [-inputs["coef"] / 4] * 4)


def test_policy_gradient_weighs_the_likelihood_by_the_credit():
    logprobs = _row([-1.0, -2.0]).requires_grad_()
    loss = policy_gradient(logprobs, _row([0.5, -3.0]))
    np.testing.assert_allclose(loss.detach(), [[0.5, -6.0]])
    loss.sum().backward()
    np.testing.assert_allclose(logprobs.grad, [[-0.5, 3.0]])


def test_entropy_is_rewarded():
    np.testing.assert_allclose(entropy(_row([0.3, 1.2])), [[-0.3, -1.2]])


@golden("value")
def test_value_losses_golden(case, at):
    values, old, returns = (at.tensor([case["inputs"][name]]) for name in ("values", "old_values", "returns"))
    clipped, squared = value_clipped(values, old, returns, clip=case["inputs"]["clip"]), value_squared(values, returns)
    at.check(clipped[0], case["outputs"]["value_clipped"])
    weights = token_mean(_everywhere(values), _one_group(values))
    at.check((weights * clipped).sum(), case["outputs"]["value_clipped_mean"])
    at.check((weights * squared).sum(), case["outputs"]["value_squared_mean"])


@pytest.mark.parametrize("side", [1.0, -1.0], ids=["above", "below"])
def test_a_clipped_value_has_no_gradient_towards_the_return_beyond_the_clip_and_its_own_elsewhere(side):
    values, old = (side * _row([0.7, 0.9, 0.2, 0.5])).requires_grad_(), side * _row([0.5, 0.5, 0.5, 0.5])
    loss = value_clipped(values, old, side * _row([1.0, 1.0, 1.0, 1.0]), clip=0.3)
    np.testing.assert_allclose(loss.detach(), [[0.045, 0.02, 0.32, 0.125]])
    loss.sum().backward()
    np.testing.assert_allclose(values.grad, side * np.array([[-0.3, 0.0, -0.8, -0.5]]))


def test_value_losses_stand_on_the_shelf_and_ranking_does_not():
    needs = {card.name: card.needs for card in LOSSES}
    assert needs["value_squared"] == ("values", "returns")
    assert needs["value_clipped"] == ("values", "old_values", "returns")
    assert "ranking" not in needs


@golden("ranking")
def test_ranking_golden(case, at):
    inputs, expected = case["inputs"], case["outputs"]
    scores, ranks = at.tensor([inputs["scores"]], grad=True), torch.tensor([inputs["ranks"]])
    margins = torch.full((1, *2 * ranks.shape[1:]), inputs["margin"], dtype=at.dtype) if "margin" in inputs else None
    loss = ranking(scores, ranks, _everywhere(ranks), margins=margins, center=inputs.get("center", 0.0))
    at.check(loss, [expected["loss"]])
    better, worse = pairs(ranks, _everywhere(ranks))[0].nonzero().T
    assert [better.tolist(), worse.tolist()] == np.transpose(expected["pairs"]).tolist()
    if "gradient" in expected:
        lead = scores[0][better] - scores[0][worse]
        at.check(lead, expected["lead"])
        at.check((lead > 0).to(at.dtype).mean(), expected["accuracy"])
        loss.sum().backward()
        at.check(scores.grad[0], expected["gradient"])


@golden("pair_counts")
def test_k_responses_make_all_their_pairs(case):
    counts = [int(pairs(torch.arange(k)[None], torch.ones(1, k, dtype=torch.bool)).sum()) for k in case["inputs"]["K"]]
    assert counts == case["outputs"]["pairs"]
    many = torch.arange(max(case["inputs"]["K"])).repeat(case["inputs"]["rankings"], 1)
    assert pairs(many, _everywhere(many)).sum() == case["outputs"]["at_most"]


def test_every_ranking_is_averaged_over_its_own_pairs_and_none_is_nothing():
    scores = torch.tensor([[1.0, 0.0, 9.0], [3.0, 2.0, 1.0], [1.0, 0.0, 9.0]], requires_grad=True)
    ranks = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 2]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    loss = ranking(scores, ranks, mask, center=0.5)
    expected = np.log1p(np.exp(-1)) + 0.5
    np.testing.assert_allclose(loss.detach(), [expected, 0, 0], rtol=1e-6)
    loss.sum().backward()
    assert (scores.grad != 0).tolist() == [[True, True, False], [False] * 3, [False] * 3]


@golden("reward_bias")
def test_demonstrations_score_nothing_on_average_after_the_bias(case, at):
    demonstrations, scores = at.tensor(case["inputs"]["demonstrations"]), at.tensor(case["inputs"]["scores"])
    bias = reward_bias(demonstrations)
    at.check(bias, case["outputs"]["bias"])
    at.check(scores + bias, case["outputs"]["shifted"])
    at.check((demonstrations + bias).mean(), 0)


def _ascent(logits, logprobs, chances, advantages):
    """Where the logits go when each answer comes as often as its chance says."""
    loss = (chances[:, None] * policy_gradient(logprobs[:, None], advantages[:, None])).sum()
    return -torch.autograd.grad(loss, logits)[0]


@golden("confidence")
@pytest.mark.parametrize(
    ("direction", "sampled", "advantages"),
    [
        ("ascent", True, lambda p, alpha: p),
        ("alpha_ascent", True, lambda p, alpha: 0 * p + alpha),
        ("all_answers_ascent", False, lambda p, alpha: p),
        ("all_answers_alpha_ascent", False, lambda p, alpha: p + alpha),
    ],
)
def test_confidence_as_reward_raises_the_agreement_of_two_samples(case, at, direction, sampled, advantages):
    p = at.tensor(case["inputs"]["p"])
    logits = p.log().requires_grad_()
    agreement = (logits.softmax(-1) ** 2).sum()
    at.check(agreement, case["outputs"]["agreement"])
    at.check(torch.autograd.grad(agreement, logits)[0], case["outputs"]["agreement_gradient"])
    chances = p if sampled else torch.ones_like(p)
    ascent = _ascent(logits, logits.log_softmax(-1), chances, advantages(p, case["inputs"]["alpha"]))
    at.check(ascent, case["outputs"][direction])


@golden("confidence_off_temperature")
def test_a_constant_reward_sharpens_where_sampling_is_colder_than_the_logprobs(case, at):
    p, alpha = at.tensor(case["inputs"]["p"]), case["inputs"]["alpha"]
    logits = p.log().requires_grad_()
    chances = (logits.detach() / case["inputs"]["temperature"]).softmax(-1)
    at.check(chances, case["outputs"]["sampled"])
    ascent = _ascent(logits, logits.log_softmax(-1), chances, torch.full_like(p, alpha))
    at.check(ascent, case["outputs"]["alpha_ascent"])


@golden("confidence_loss")
def test_confidence_as_reward_is_detached_and_sums_the_logprobs(case, at):
    inputs, expected = case["inputs"], case["outputs"]
    logprobs = at.tensor([[total / 4, total * 3 / 4] for total in inputs["sum_logprobs"]], grad=True)
    p = at.tensor(inputs["sum_logprobs"]).exp()
    at.check(p, expected["p"])
    weights = sequence_sum(_everywhere(logprobs), _one_group(logprobs))

    def loss(rewards):
        return (weights * policy_gradient(logprobs, rewards[:, None].expand(-1, 2))).sum()

    at.check(loss(p), expected["without_alpha"])
    at.check(loss(p + inputs["alpha"]), expected["loss"])
    at.check(2 * loss(p + inputs["alpha"]), expected["summed"])
    loss(p + inputs["alpha"]).backward()
    at.check(logprobs.grad, np.repeat(expected["gradient"], 2).reshape(2, 2))


@golden("kl_controller")
def test_the_coefficient_follows_the_divergence(case):
    inputs = case["inputs"]
    controller = KlController(target=inputs["target"], horizon=inputs["horizon"])
    scale = controller.next(inputs["scale"], inputs["divergence"], inputs["responses"])
    assert scale == pytest.approx(case["outputs"], rel=1e-6)
