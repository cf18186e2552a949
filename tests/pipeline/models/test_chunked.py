"""Log-probabilities a tile at a time equal those of all logits at once, in value and in gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.chunked import token_logprobs


def plain(hidden, weight, bias, targets, temperature):
    z = (hidden @ weight.t() + (0 if bias is None else bias)).double() / temperature
    scores = z.log_softmax(dim=1)
    return scores.gather(1, targets[:, None])[:, 0], -(scores.exp() * scores).sum(dim=1)


def drawn(count, width, vocabulary, biased, seed=0):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=random).requires_grad_()
    weight = (3 * torch.randn(vocabulary, width, generator=random) / width**0.5).requires_grad_()
    bias = torch.randn(vocabulary, generator=random).requires_grad_() if biased else None
    return hidden, weight, bias, torch.randint(vocabulary, (count,), generator=random)


def gradients(outputs, weights, inputs):
    return torch.autograd.grad(sum((out * w).sum() for out, w in zip(outputs, weights, strict=True)), inputs)


@given(
    count=st.integers(1, 40), width=st.integers(1, 12), vocabulary=st.integers(2, 50), biased=st.booleans(),
    tile=st.integers(1, 50), temperature=st.sampled_from([0.3, 1.0, 2.0]), of_entropy=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_values_and_gradients_equal_the_plain_form_to_1e_5(
    count, width, vocabulary, biased, tile, temperature, of_entropy, seed
):
    hidden, weight, bias, targets = drawn(count, width, vocabulary, biased, seed)
    found = token_logprobs(hidden, weight, bias, targets, temperature=temperature, entropy=True, tile=tile)
    wanted = plain(hidden, weight, bias, targets, temperature)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=2e-5)
    g = torch.linspace(-1, 1, count)
    inputs = [hidden, weight] + ([bias] if biased else [])
    ours, theirs = (gradients(made, (g, of_entropy * g), inputs) for made in (found, wanted))
    for mine, plainly in zip(ours, theirs, strict=True):
        assert (mine - plainly).norm() <= 1e-5 * max(1.0, float(plainly.norm()))


def test_only_what_is_trained_gets_a_gradient():
    hidden, weight, _, targets = drawn(5, 4, 9, False)
    logprobs, entropies = token_logprobs(hidden, weight.detach(), None, targets)
    assert entropies is None
    logprobs.sum().backward()
    assert weight.grad is None
    expected = torch.autograd.grad(plain(hidden, weight, None, targets, 1.0)[0].sum(), hidden)[0]
    assert torch.allclose(hidden.grad, expected, atol=1e-5)


def test_a_gradient_through_the_entropy_alone():
    hidden, weight, _, targets = drawn(5, 4, 9, False)
    found = token_logprobs(hidden, weight, None, targets, entropy=True, tile=2)[1]
    wanted = plain(hidden, weight, None, targets, 1.0)[1]
    for ours, theirs in zip(*(torch.autograd.grad(e.sum(), (hidden, weight)) for e in (found, wanted)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_large_logits_neither_overflow_nor_vanish():
    weight = torch.tensor([[1e4], [-1e4], [0.0]])
    logprobs, entropies = token_logprobs(torch.ones(1, 1), weight, None, torch.tensor([0]), entropy=True)
    assert (logprobs.tolist(), entropies.tolist()) == ([0.0], [0.0])
    assert token_logprobs(torch.ones(1, 1), weight, None, torch.tensor([1]))[0].tolist() == [-2e4]


def test_half_precision_weights_have_full_precision_log_probabilities():
    hidden, weight, _, targets = drawn(6, 8, 20, False)
    half, heads = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    found, _ = token_logprobs(half, heads, None, targets, tile=4)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert (half.grad.dtype, heads.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    plainly = torch.autograd.grad(plain(hidden, weight, None, targets, 1.0)[0].sum(), (hidden, weight))
    for ours, theirs in zip((half.grad, heads.grad), plainly, strict=True):
        assert (ours.float() - theirs).norm() < 0.05 * theirs.norm()


def test_no_position_at_all():
    hidden, weight, _, _ = drawn(3, 4, 9, False)
    logprobs, entropies = token_logprobs(hidden[:0], weight, None, torch.zeros(0, dtype=torch.long), entropy=True)
    assert logprobs.shape == entropies.shape == (0,)
    assert logprobs.sum().item() == 0


@pytest.mark.parametrize("entropy", [False, True])
def test_what_is_kept_for_the_backward_pass_is_no_larger_than_the_inputs(entropy):
    hidden, weight, _, targets = drawn(64, 4, 500, False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_logprobs(hidden, weight, None, targets, entropy=entropy, tile=8)
    assert max(kept) == weight.numel()
