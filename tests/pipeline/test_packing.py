"""Tokens behind one another: each once, in rows for attention and back again, and gradients that add up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import MOST_PADDING, Packed, Padded, Taken, numbered, rounded, runs

CPU = torch.device("cpu")
TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(TEXT, st.lists(st.integers(0, 99), max_size=9)), min_size=1, max_size=12)


def unzipped(pairs):
    prompts, responses = zip(*pairs, strict=True)
    return list(prompts), list(responses)


@pytest.mark.parametrize("layout", [Packed, Padded])
@given(pairs=PAIRS)
def test_every_response_token_is_behind_the_one_before_it(layout, pairs):
    prompts, responses = unzipped(pairs)
    made = layout(prompts, responses, CPU)
    flat, positions = made.tokens.flatten(), made.positions.flatten()
    whole = [prompt + response for prompt, response in pairs]
    said = [token for response in responses for token in response]
    assert len(made.targets) == len(made.before.index) < len(said) * 17 / 16 + 1
    assert made.targets[: len(said)].tolist() == said
    assert made.mask.sum(dim=1).tolist() == [len(response) for response in responses]
    expected = [
        (text[place - 1], place - 1)
        for text, prompt in zip(whole, prompts, strict=True)
        for place in range(len(prompt), len(text))
    ]
    before = made.before.index[: len(said)]
    assert list(zip(flat[before].tolist(), positions[before].tolist(), strict=True)) == expected
    assert flat[made.last.index].tolist() == [text[-1] for text in whole]
    assert positions[made.last.index].tolist() == [len(text) - 1 for text in whole]


@given(pairs=PAIRS)
def test_a_prompt_is_there_once_and_padding_hardly(pairs):
    prompts, responses = unzipped(pairs)
    real = sum(map(len, {tuple(prompt) for prompt in prompts})) + sum(map(len, responses))
    assert Packed(prompts, responses, CPU).tokens.shape == (1, rounded(real))


def test_sizes_are_few_and_hardly_larger():
    sizes = [rounded(tokens) for tokens in range(1, 5000)]
    assert all(0 <= size - tokens < tokens / 16 + 1 for tokens, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 150
    assert sizes[:32] == list(range(1, 33))
    assert [rounded(tokens, least=8) for tokens in (1, 8, 9, 250, 257, 600)] == [8, 8, 16, 256, 272, 608]


@given(pairs=PAIRS)
def test_rows_hold_each_response_behind_its_prompt_and_come_back_together(pairs):
    prompts, responses = unzipped(pairs)
    made = Packed(prompts, responses, CPU)
    states = torch.stack([made.tokens[0], made.positions[0]], dim=1).double()
    blocks = made.apart(states)
    rows = [row.tolist() for block in blocks for row in block]
    assert sorted(rows) == sorted(
        [[float(token), float(place)] for place, token in enumerate(text)]
        + [[float(text[-1]), float(len(text) - 1)]] * (width - len(text))
        for text, width in zip(
            sorted((p + r for p, r in pairs), key=len, reverse=True),
            (block.shape[1] for block in blocks for _ in block),
            strict=True,
        )
    )
    real = sum(map(len, {tuple(prompt) for prompt in prompts})) + sum(map(len, responses))
    assert torch.equal(made.together(blocks)[:real], states[:real])


@given(PAIRS)
def test_gradients_of_rows_add_up(pairs):
    made = Packed(*unzipped(pairs), CPU)
    states = torch.randn(made.tokens.shape[1], 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn_like(block) for block in made.apart(states)]
    sum((block * weight).sum() for block, weight in zip(made.apart(states), weights, strict=True)).backward()
    # What is linear has its gradient for its own transpose.
    other = torch.randn_like(states)
    along = sum((block * weight).sum() for block, weight in zip(made.apart(other), weights, strict=True))
    assert torch.allclose((states.grad * other).sum(), along)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_of_what_is_taken_is_that_of_autograd(dtype):
    rows = np.array([4, 1, 1, 0, 4, 4])
    states = torch.randn(6, 8).to(dtype).requires_grad_()
    weights = torch.randn(6, 8).to(dtype)
    (ours,) = torch.autograd.grad((Taken(rows, 6, CPU)(states) * weights).sum(), states)
    (expected,) = torch.autograd.grad((states[torch.from_numpy(rows)] * weights).sum(), states)
    assert torch.allclose(ours, expected, atol=1e-6 if dtype != torch.bfloat16 else 0.05)
    assert (ours[[2, 3, 5]] == 0).all()


@given(st.lists(st.integers(0, 50), max_size=30))
def test_runs_are_dense_and_leave_nothing_out(lengths):
    lengths = np.array(sorted(lengths, reverse=True), dtype=np.int64)
    found = list(runs(lengths))
    assert [row for run in found for row in range(run.start, run.stop)] == list(range(len(lengths)))
    for run in found:
        assert lengths[run].sum() >= (1 - MOST_PADDING) * len(lengths[run]) * lengths[run.start]


def test_equal_texts_have_one_number():
    assert numbered([[1, 2], [3], [1, 2], [], [3]]).tolist() == [0, 1, 0, 2, 1]
