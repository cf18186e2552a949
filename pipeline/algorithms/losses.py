"""Loss pieces: a loss per token, to be minimised. `weights.py` says what each token counts; the sum is the trainer's.

Log-probabilities are in nat, of the tokens that were sampled, at the sampling temperature. Padding is 0 in every column
and its weight is 0, so that what a piece returns there does not matter as long as it is finite.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from pipeline.algorithms.shelf import Shelf

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are bounded here before exp, in nat, as verl and OpenRLHF do; the papers have no bound."""


def policy_gradient(logprobs: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Log-likelihood weighted by credit.

        L_t = -A_t * log pi(a_t)                                           (REINFORCE)

    No ratio and no clipping: the gradient is right for responses sampled by the policy itself.
    """
    return -advantages * logprobs


def clipped_surrogate(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    clip_low: Annotated[float, Field(gt=0, le=1)],
    clip_high: Annotated[float, Field(gt=0)],
    dual_clip: Annotated[float, Field(gt=1)] | None = None,
) -> Float[Tensor, "B T"]:
    """The objective of PPO, with bounds of their own below and above.

        L_t = -min( s_t * A_t , clip(s_t, 1 - clip_low, 1 + clip_high) * A_t ),   s_t = pi(a_t) / pi_old(a_t)

    GRPO (arXiv:2402.03300, eq. 3) with equal bounds; DAPO (arXiv:2503.14476, eq. 8) with the upper one wider. Where
    A_t > 0 the gradient stops above 1 + clip_high, where A_t < 0 it stops below 1 - clip_low. `dual_clip` also bounds
    L_t by -dual_clip * A_t where A_t < 0; no paper here has it, verl sets it to 3.
    """
    ratio = torch.clamp(logprobs - old_logprobs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def kl(
    logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"], *, estimator: Literal["k1", "k2", "k3"]
) -> Float[Tensor, "B T"]:
    """Estimated divergence of the policy from the reference, at the current weights.

        k1 = d      k2 = d^2 / 2      k3 = exp(-d) + d - 1,      d = log pi(a_t) - log pi_ref(a_t)

    GRPO has k3 (arXiv:2402.03300, eq. 4). On sampled tokens the expected gradient of k1 is 0, of k2 that of
    KL(pi || ref), of k3 that of KL(ref || pi). d is bounded below at -20 in k3, against overflow.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    d = torch.clamp(d, min=-LOG_RATIO_LIMIT)
    return torch.expm1(-d) + d  # expm1: where the policies hardly differ, exp(-d) - 1 would be rounding


def nll(logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Negative log-likelihood: L_t = -log pi(a_t). Imitation, as in supervised fine-tuning."""
    return -logprobs


def entropy(entropies: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Negative entropy of the next token's distribution: L_t = -H_t. A positive `coef` keeps the policy exploring."""
    return -entropies


LOSSES: Shelf[Float[Tensor, "B T"]] = Shelf("loss", [policy_gradient, clipped_surrogate, kl, nll, entropy])
