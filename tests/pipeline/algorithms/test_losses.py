"""A loss per token, and its gradient."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.algorithms.losses import clipped_surrogate, entropy, kl, nll, policy_gradient

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())


def _row(values, grad=False):
    return torch.from_numpy(np.array([values], np.float64)).requires_grad_(grad)


@pytest.mark.parametrize("case", GOLDEN["clipped_surrogate"], ids=lambda case: case["name"])
def test_clipped_surrogate_golden(case):
    inputs, expected = case["inputs"], case["outputs"]
    ratio = np.array(inputs["ratio"])
    logprobs = _row(np.log(ratio), grad=True)
    advantages = torch.full_like(logprobs, inputs["advantage"], requires_grad=False)
    bounds = {name: inputs[name] for name in ("clip_low", "clip_high", "dual_clip")}
    loss = clipped_surrogate(logprobs, torch.zeros_like(logprobs), advantages, **bounds)
    np.testing.assert_allclose(loss.detach()[0], expected["loss"], rtol=1e-6)
    if expected["slope"] is not None:
        loss.sum().backward()
        slope = logprobs.grad[0].numpy() / ratio
        # On a bound itself the slope is a matter of rounding.
        inside = ~np.isclose(ratio, 1 - inputs["clip_low"]) & ~np.isclose(ratio, 1 + inputs["clip_high"])
        np.testing.assert_allclose(slope[inside], np.array(expected["slope"])[inside], rtol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["log_ratio_limit"], ids=lambda case: case["name"])
def test_log_ratios_are_bounded(case):
    logprobs = _row(case["inputs"]["log_ratio"], grad=True)
    loss = clipped_surrogate(
        logprobs, torch.zeros_like(logprobs), -torch.ones_like(logprobs), clip_low=1.0, clip_high=float("inf")
    )
    np.testing.assert_allclose(loss.detach()[0], case["outputs"]["ratio"], rtol=1e-6)
    loss.sum().backward()
    np.testing.assert_array_equal(logprobs.grad, 0)


@pytest.mark.parametrize("case", GOLDEN["kl"], ids=lambda case: case["name"])
def test_kl_golden(case):
    logprobs = _row(case["inputs"]["difference"], grad=True)
    value = kl(logprobs, torch.zeros_like(logprobs), estimator=case["inputs"]["estimator"])
    np.testing.assert_allclose(value.detach()[0], case["outputs"]["value"], rtol=1e-6, atol=1e-12)
    value.sum().backward()
    np.testing.assert_allclose(logprobs.grad[0], case["outputs"]["gradient"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", GOLDEN["kl_two_outcomes"], ids=lambda case: case["name"])
def test_expected_kl_and_gradient_over_two_tokens(case):
    policy, reference = _row(case["inputs"]["policy"]), _row(case["inputs"]["reference"])
    logits = policy.log().requires_grad_()
    value = kl(logits.log_softmax(-1), reference.log(), estimator=case["inputs"]["estimator"])
    expected = (policy * value).sum()
    expected.backward()
    np.testing.assert_allclose(expected.detach(), case["outputs"]["value"], rtol=1e-6)
    np.testing.assert_allclose(logits.grad[0], case["outputs"]["gradient"], rtol=1e-6, atol=1e-12)


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


@pytest.mark.parametrize("case", GOLDEN["logprob_at_temperature"], ids=lambda case: case["name"])
def test_nll_of_a_token_at_a_temperature(case):
    logits, token = torch.tensor(case["inputs"]["logits"], dtype=torch.float64), case["inputs"]["token"]
    logprobs = (logits / case["inputs"]["temperature"]).log_softmax(-1)[None, token : token + 1]
    np.testing.assert_allclose(nll(logprobs).item(), -case["outputs"], rtol=1e-6)


def test_policy_gradient_weighs_the_likelihood_by_the_credit():
    logprobs = _row([-1.0, -2.0], grad=True)
    loss = policy_gradient(logprobs, _row([0.5, -3.0]))
    np.testing.assert_allclose(loss.detach(), [[0.5, -6.0]])
    loss.sum().backward()
    np.testing.assert_allclose(logprobs.grad, [[-0.5, 3.0]])


def test_entropy_is_rewarded():
    np.testing.assert_allclose(entropy(_row([0.3, 1.2])), [[-0.3, -1.2]])
