"""Products give what transformers' own attention gives, gradients included, and are what short rows are read by."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline import attention as room
from pipeline.attention import NAME, SHORT, attend_by_products, attention

ROWS, WIDTH = 5, 8


def states(heads, shared, tokens, seen):
    """Query, keys and values as a model hands them over: no tensor lies in the order of its dimensions."""
    draw = torch.Generator().manual_seed(tokens)
    query = torch.randn(ROWS, tokens, heads, WIDTH, generator=draw).transpose(1, 2)
    keys, values = (torch.randn(ROWS, shared, seen + 3, WIDTH, generator=draw)[:, :, :seen] for _ in range(2))
    return query, keys, values


def padded(tokens, seen):
    """Rows that begin with none to four tokens of padding, which no token looks at."""
    mask = torch.arange(seen) >= torch.arange(ROWS)[:, None]
    return mask[:, None, None].expand(ROWS, 1, tokens, seen)


def both(query, keys, values, mask):
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // keys.shape[1], is_causal=True)
    found = []
    for function in (attention, sdpa_attention_forward):
        given = [tensor.detach().requires_grad_() for tensor in (query, keys, values)]
        output, weights = function(module, *given, mask, scaling=WIDTH**-0.5)
        assert weights is None
        (output * torch.arange(output.numel()).view(output.shape).cos()).sum().backward()
        found.append((output.detach(), *(tensor.grad for tensor in given)))
    return found


@pytest.fixture
def products_only(monkeypatch):
    """Whoever asks transformers for its own attention fails."""

    def fail(*_, **__):
        raise AssertionError("not by products")

    monkeypatch.setattr(room, "sdpa_attention_forward", fail)


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("tokens", "seen", "mask"), [(1, 9, None), (1, 9, padded(1, 9)), (1, 1, None), (7, 7, None), (SHORT, SHORT, None)]
)
def test_short_rows_are_read_by_products_to_the_numbers_of_transformers(
    heads, shared, tokens, seen, mask, products_only
):
    ours, theirs = both(*states(heads, shared, tokens, seen), mask)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "seen", "mask"),
    [
        (SHORT + 1, SHORT + 1, None),
        (7, 7, padded(7, 7)),
        (2, 9, padded(2, 9)),
        (1, 9, torch.zeros(ROWS, 1, 1, 9).masked_fill(~padded(1, 9), -torch.inf)),
    ],
)
def test_all_else_is_left_to_transformers(tokens, seen, mask):
    ours, theirs = both(*states(4, 2, tokens, seen), mask)
    assert all(torch.equal(found, expected) for found, expected in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("asked", [{"dropout": 0.1}, {"is_causal": False}, {"position_bias": torch.zeros(1)}])
def test_what_products_do_not_know_is_left_to_transformers(products_only, asked):
    with pytest.raises(AssertionError, match="not by products"):
        attention(SimpleNamespace(is_causal=True), *states(4, 2, 7, 7), None, scaling=1.0, **asked)


def test_tokens_that_look_ahead_are_left_to_transformers(products_only):
    with pytest.raises(AssertionError, match="not by products"):
        attention(SimpleNamespace(is_causal=False), *states(4, 2, 7, 7), None, scaling=1.0)


@pytest.mark.parametrize(("attends", "afterwards"), [("sdpa", NAME), ("eager", "eager")])
def test_a_model_that_attends_otherwise_stays_as_it_is(attends, afterwards):
    config = SimpleNamespace(_attn_implementation=attends)
    model = SimpleNamespace(
        config=config, set_attn_implementation=lambda name: setattr(config, "_attn_implementation", name)
    )
    attend_by_products(model)
    assert config._attn_implementation == afterwards
