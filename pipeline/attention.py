"""Attention of short rows by plain products: faster there than what transformers calls `sdpa`, and the same numbers.

Shapes: B rows, H heads, K heads of keys and values (H/K heads share one), T tokens that look, S tokens looked at, D
width of a head.
"""

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.packing import Packed
from pipeline.products import narrow_products

NAME = "sdpa_or_products"
"""What transformers calls it."""

SHORT = 96
"""Most tokens of a row that is read whole by products on a CPU, where two thirds of the time were measured at 57 tokens
and as much at 192 (4 heads of 32, forward and backward, two cores)."""


def attend_by_products(model: Any) -> None:
    """Have the model attend by `attention` in place of `sdpa`; one that attends otherwise stays as it is."""
    if model.config._attn_implementation == "sdpa":  # transformers has no public name for what it is
        model.set_attn_implementation(NAME)


def attention(
    module: Any,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S D"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
    **given: Any,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """softmax(scaling q k^T + mask) v, as transformers asks for it.

    By products where one token looks, or a short row at itself: heads that share keys are then tokens of one head, and
    nothing is repeated for them. All else is `sdpa`'s. Tokens that are `packed`, B = 1, are put in rows for this.
    """
    if packed is not None:
        return _in_rows(module, packed, query, key, value, scaling=scaling, dropout=dropout, **given), None
    (rows, heads, tokens, width), (shared, seen) = query.shape, key.shape[1:3]
    one = tokens == 1 and (attention_mask is None or attention_mask.dtype == torch.bool)
    whole = attention_mask is None and tokens == seen <= SHORT and query.device.type == "cpu"
    whole = whole and getattr(module, "is_causal", True)
    asked = dropout or any(given.get(name) is not None for name in ("is_causal", "position_bias"))
    if scaling is None or asked or not (one or whole):
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **given
        )
        return output
    together = query.reshape(rows * shared, heads // shared * tokens, width)
    keys, values = (states.reshape(rows * shared, seen, width) for states in (key, value))
    added = torch.zeros((), dtype=query.dtype, device=query.device)
    if whole:
        added = added.expand(tokens, seen).masked_fill(~_earlier(tokens, query.device), -torch.inf)
        added = added.repeat(heads // shared, 1)
    elif attention_mask is not None:
        added = added.expand(rows, seen).masked_fill(~attention_mask[:, 0, 0], -torch.inf)
        added = added.repeat_interleave(shared, dim=0)[:, None]
    with narrow_products() if one else nullcontext():  # every token that is sampled makes another shape
        weights = torch.baddbmm(added, together, keys.transpose(1, 2), alpha=scaling).softmax(-1, dtype=torch.float32)
        found = torch.bmm(weights.to(value.dtype), values).view(rows, heads, tokens, width)
    return found.transpose(1, 2).contiguous(), None


def _in_rows(
    module: Any, packed: Packed, query: Tensor, key: Tensor, value: Tensor, **given: Any
) -> Float[Tensor, "1 N H D"]:
    """Attention of packed tokens: rows of one length after the other, padded on the right and so without a mask."""
    packed.attended += 1
    width = query.shape[-1]
    blocks = (packed.apart(states[0].transpose(0, 1).flatten(1)) for states in (query, key, value))
    found = []
    for block in zip(*blocks, strict=True):
        heads = [states.view(*states.shape[:2], -1, width).transpose(1, 2) for states in block]
        found.append(attention(module, heads[0], heads[1], heads[2], None, **given)[0].flatten(2))
    return packed.together(found).view(1, query.shape[2], -1, width)


def _earlier(tokens: int, device: torch.device) -> Bool[Tensor, "T T"]:
    """True where a token is looked at by itself or a later one."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
