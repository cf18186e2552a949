"""What a token counts. The loss of an optimizer step is always (weights * token loss).sum().

A mask holds all rows of the step: the weights are computed before the rows are dealt to micro-batches and ranks, which
then cannot change the gradient. TRL f2cd5771 divides its 'grpo' and 'bnpo' by the counts of one process instead. Rows
without any unmasked token do not count as responses, as in verl and OpenRLHF (TRL counts them).

`group` has one number per occurrence of a prompt; every function takes it, one reads it. Dr. GRPO (arXiv:2503.20783)
divides by a constant length L: `sequence_sum`, and 1 / L as the `coef` of the loss.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def token_mean(mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]) -> Float[Tensor, "B T"]:
    """Every token the same: 1 / sum_i |o_i|.

    DAPO as released, VAPO eq. 7, and what verl, OpenRLHF and TRL ('dapo') do unless told otherwise: the tokens of the
    whole step, not of one group as DAPO's eq. 8 is printed.
    """
    return mask / mask.sum().clamp(min=1)


def group_token_mean(mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]) -> Float[Tensor, "B T"]:
    """Every prompt the same, the tokens of its responses sharing: 1 / (P sum_{j in group of i} |o_j|).

    DAPO (arXiv:2503.14476) as eq. 8 is printed: a token mean inside each group, then the mean over the P groups that
    have a token. No implementation read does it.
    """
    place = torch.unique(group, return_inverse=True)[1]
    tokens = torch.zeros_like(place).index_add(0, place, mask.sum(dim=1))
    return mask / ((tokens > 0).sum() * tokens[place]).clamp(min=1)[:, None]


def sequence_mean(mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]) -> Float[Tensor, "B T"]:
    """Every response the same, its tokens sharing: 1 / (B |o_i|), as in GRPO's eq. 3 and verl's seq-mean-token-mean."""
    return mask / (_responses(mask) * mask.sum(dim=1, keepdim=True).clamp(min=1))


def sequence_sum(mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]) -> Float[Tensor, "B T"]:
    """The mean over responses of the sum over tokens: 1 / B. A response is one action, as in RLOO and ReMax.

    ReMax's released code (536ba49c) takes the mean over tokens. verl's seq-mean-token-sum-norm is this over a constant
    length, at b178a3cd without the 1 / B.
    """
    return mask / _responses(mask)


def _responses(mask: Bool[Tensor, "B T"]) -> Tensor:
    return torch.clamp(mask.any(dim=1).sum(), min=1)


WEIGHTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    function.__name__: function for function in (token_mean, group_token_mean, sequence_mean, sequence_sum)
}
