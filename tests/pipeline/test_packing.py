"""Tokens behind one another: each once, in rows for attention and back again, and gradients that add up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import MOST_PADDING, Packed, Padded, Taken, Tree, numbered, rounded, runs

CPU = torch.device("cpu")
TEXT = st.lists(st.integers(0, 3), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(TEXT, st.lists(st.integers(0, 99), max_size=9)), min_size=1, max_size=12)


def unzipped(pairs):
    prompts, responses = zip(*pairs, strict=True)
    return list(prompts), list(responses)


def beginnings(pairs):
    """Of all texts, each once."""
    texts = [tuple(prompt + response) for prompt, response in pairs]
    return {text[:end] for text in texts for end in range(1, len(text) + 1)}


@given(pairs=PAIRS)
def test_a_tree_has_every_beginning_once_behind_the_one_before_it(pairs):
    texts = [prompt + response for prompt, response in pairs]
    tree, found = Tree(texts), {}
    for text, nodes in zip(texts, tree.nodes, strict=True):
        for place, (token, node) in enumerate(zip(text, nodes, strict=False)):
            assert found.setdefault(tuple(text[: place + 1]), node) == node
            assert (tree.tokens[node], tree.positions[node]) == (token, place)
            assert tree.parents[node] == (nodes[place - 1] if place else -1)
    assert found.keys() == beginnings(pairs)
    assert sorted(found.values()) == list(range(len(tree.tokens)))


@pytest.mark.parametrize("layout", [Packed, Padded])
@given(pairs=PAIRS)
def test_every_response_token_is_behind_the_one_before_it(layout, pairs):
    prompts, responses = unzipped(pairs)
    made = layout(prompts, responses, CPU)
    before, last = (
        torch.stack([of.flatten()[taken.index].float() for of in (made.tokens, made.positions)])
        for taken in (made.before, made.last)
    )
    rows = [made.in_rows(of) for of in (made.targets.float(), *before)]
    assert made.mask.sum(dim=1).tolist() == [len(response) for response in responses]
    for number, (prompt, response) in enumerate(pairs):
        text = prompt + response
        targets, tokens, places = (of[number][made.mask[number]].tolist() for of in rows)
        assert targets == response
        assert tokens == text[len(prompt) - 1 : -1]
        assert places == list(range(len(prompt) - 1, len(text) - 1))
        assert last[:, number].tolist() == [text[-1], len(text) - 1]
    assert not any(of[~made.mask].any() for of in rows)


@given(pairs=PAIRS)
def test_what_texts_begin_with_is_there_once_and_padding_hardly(pairs):
    made = Packed(*unzipped(pairs), CPU)
    assert made.tokens.shape == (1, rounded(len(beginnings(pairs))))
    said = {tuple(p + r[:end]) for p, r in pairs for end in range(1, len(r) + 1)}
    assert len(made.targets) == len(made.before.index) == rounded(len(said))


def test_sizes_are_few_and_hardly_larger():
    sizes = [rounded(tokens) for tokens in range(1, 5000)]
    assert all(0 <= size - tokens < tokens / 16 + 1 for tokens, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 150
    assert sizes[:32] == list(range(1, 33))
    assert [rounded(tokens, least=8) for tokens in (1, 8, 9, 250, 257, 600)] == [8, 8, 16, 256, 272, 608]


@given(pairs=PAIRS)
def test_rows_hold_each_text_that_no_other_begins_with_and_come_back_together(pairs):
    made = Packed(*unzipped(pairs), CPU)
    states = torch.stack([made.tokens[0], made.positions[0]], dim=1).double()
    blocks = made.apart(states)
    texts = {tuple(prompt + response) for prompt, response in pairs}
    found = []
    for tokens, places in (row.T.long().tolist() for block in blocks for row in block):
        end = places[-1]
        found.append(tuple(tokens[: end + 1]))
        assert places == [min(place, end) for place in range(len(places))]
        assert tokens[end:] == [tokens[end]] * (len(tokens) - end)
    assert sorted(found) == sorted(
        text for text in texts if not any(other[: len(text)] == text != other for other in texts)
    )
    assert [len(text) for text in found] == sorted(map(len, found), reverse=True)
    real = len(beginnings(pairs))
    assert torch.equal(made.together(blocks)[:real], states[:real])


@given(PAIRS)
def test_gradients_of_rows_add_up(pairs):
    made = Packed(*unzipped(pairs), CPU)
    numbers = torch.randn(len(made.targets), dtype=torch.float64, requires_grad=True)
    made.in_rows(numbers).sum().backward()
    assert numbers.grad.sum() == made.mask.sum()
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
