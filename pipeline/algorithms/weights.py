"""What a token counts. The loss of an optimizer step is always (weights * token loss).sum().

A mask holds all rows of the step: the weights are computed before the rows are dealt to micro-batches and ranks, which
then cannot change the gradient. Rows without any unmasked token do not count as responses, as in verl and OpenRLHF
(TRL counts them).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def token_mean(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Every token the same: 1 / sum_i |o_i|.

    DAPO as released and VAPO eq. 7: the tokens of the whole step, not of one group as DAPO's eq. 8 is printed.
    """
    return mask / mask.sum().clamp(min=1)


def sequence_mean(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Every response the same, its tokens sharing: 1 / (B |o_i|), as in GRPO's eq. 3."""
    return mask / (_responses(mask) * mask.sum(dim=1, keepdim=True).clamp(min=1))


def sequence_sum(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The mean over responses of the sum over tokens: 1 / B. A response is one action, as in RLOO and ReMax."""
    return mask / _responses(mask)


def _responses(mask: Bool[Tensor, "B T"]) -> Tensor:
    return torch.clamp(mask.any(dim=1).sum(), min=1)


WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function for function in (token_mean, sequence_mean, sequence_sum)
}
