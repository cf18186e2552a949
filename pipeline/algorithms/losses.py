"""Loss pieces: a loss per token, to be minimised. `weights.py` says what each token counts; the sum is the trainer's.

Log-probabilities are in nat, of the tokens that were sampled, at the sampling temperature. Padding is 0 in every column
and its weight is 0, so that what a piece returns there does not matter as long as it is finite.

`ranking`, with its companions `pairs` and `reward_bias`, stands here too but not on the shelf: it is the reward model's
loss, one number per ranking and not per token.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.algorithms.shelf import Shelf

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are bounded here before exp, in nat, as verl and OpenRLHF do; the papers have no bound."""


def policy_gradient(logprobs: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Log-likelihood weighted by credit.

        L_t = -A_t * log pi(a_t)                                           (REINFORCE)

    No ratio and no clipping: the gradient is right for responses sampled by the policy itself.
    """
    return -advantages * logprobs


def ratios(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    ratio: Literal["token", "response"],
) -> Float[Tensor, "B T"]:
    """How much likelier a token, or the response it belongs to, has become since the update began.

        token:      s_t = exp( log pi(a_t) - log pi_old(a_t) )
        response:   s_t = exp( sum_u log pi(a_u) - log pi_old(a_u) )         the same on every token of the response

    The exponent is bounded by `LOG_RATIO_LIMIT`, also where it is a sum.
    """
    change = logprobs - old_logprobs
    if ratio == "response":
        change = torch.where(mask, change, 0).sum(dim=1, keepdim=True).expand_as(change)
    return torch.clamp(change, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_low: Annotated[float, Field(gt=0, le=1)],
    clip_high: Annotated[float, Field(gt=0)],
    dual_clip: Annotated[float, Field(gt=1)] | None = None,
    ratio: Literal["token", "response"] = "token",
) -> Float[Tensor, "B T"]:
    """The objective of PPO, with bounds of their own below and above.

        L_t = -min( s_t * A_t , clip(s_t, 1 - clip_low, 1 + clip_high) * A_t ),   s_t = pi(a_t) / pi_old(a_t)

    GRPO (arXiv:2402.03300, eq. 3) with equal bounds; DAPO (arXiv:2503.14476, eq. 8) with the upper one wider. Where
    A_t > 0 the gradient stops above 1 + clip_high, where A_t < 0 it stops below 1 - clip_low. `dual_clip` also bounds
    L_t by -dual_clip * A_t where A_t < 0. No paper here has it: verl b178a3cd sets it to 3, and to 10 for DAPO;
    OpenRLHF 3c3be623 leaves it off; TRL f2cd5771 may bound the ratio itself instead, and bounds no log-ratio.

    `ratio = "response"` puts the ratio of the whole response on each of its tokens: with the weights `sequence_mean`
    it is TRL's RLOO. verl and OpenRLHF keep one ratio per token there, and the paper (arXiv:2402.14740) has none.
    """
    s = ratios(logprobs, old_logprobs, mask, ratio=ratio)
    loss = torch.maximum(-advantages * s, -advantages * torch.clamp(s, 1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def kl(
    logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"], *, estimator: Literal["k1", "k2", "k3"]
) -> Float[Tensor, "B T"]:
    """Estimated divergence of the policy from the reference, at the current weights.

        k1 = d      k2 = d^2 / 2      k3 = exp(-d) + d - 1,      d = log pi(a_t) - log pi_ref(a_t)

    GRPO has k3 (arXiv:2402.03300, eq. 4). On sampled tokens the expected gradient of k1 is 0, of k2 that of
    KL(pi || ref), of k3 that of KL(ref || pi). d is bounded below at -20 in k3, against overflow. verl b178a3cd bounds
    d at both ends and k3 at 10; OpenRLHF 3c3be623 bounds every estimator at 10; TRL f2cd5771 bounds nothing.
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


def value_squared(values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Squared error of the critic.

        L_t = 0.5 * (V_t - R_t)^2                                          (VC-PPO, arXiv:2503.01491, algorithm 1)

    The factor is also that of lm-human-preferences, verl and OpenRLHF.
    """
    return 0.5 * (values - returns) ** 2


def value_clipped(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    *,
    clip: Annotated[float, Field(gt=0)] = 0.2,
) -> Float[Tensor, "B T"]:
    """Squared error of the critic, which gains nothing from moving further than `clip` towards the return.

        L_t = 0.5 * max( (V_t - R_t)^2 , (clip(V_t, V_old_t - clip, V_old_t + clip) - R_t)^2 )

    lm-human-preferences cbfd210b; no paper here writes it down. `clip` is 0.2 there and in TRL f2cd5771, 0.5 in verl
    b178a3cd and OpenRLHF 3c3be623 (0.2 before). Where policy and critic share an optimizer, lm-human-preferences and
    TRL multiply it by 0.1; here they do not. Never below `value_squared`.
    """
    bounded = torch.clamp(values, old_values - clip, old_values + clip)
    return torch.maximum(value_squared(values, returns), value_squared(bounded, returns))


def pairs(ranks: Int[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> Bool[Tensor, "N K K"]:
    """Which responses of each of N rankings are compared: [n, i, j] is True where i is better than j.

    Rank 0 is best. Equal ranks are ties and form no pair; neither do places without a response, where `mask` is False.
    K responses without a tie make K (K - 1) / 2 pairs.
    """
    return (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def ranking(
    scores: Float[Tensor, "N K"],
    ranks: Int[Tensor, "N K"],
    mask: Bool[Tensor, "N K"],
    *,
    margins: Float[Tensor, "N K K"] | None = None,
    center: float = 0.0,
) -> Float[Tensor, " N"]:
    """Loss of a reward model on each of N rankings, averaged over the ranking's own pairs.

        L = mean over pairs (i better than j) of  -log sigmoid(r_i - r_j - margin_ij) + center * (r_i + r_j)^2

    InstructGPT (arXiv:2203.02155, eq. 1) where nothing but the scores is given: `margins` are OpenRLHF's and TRL's,
    `center` is TRL's `center_rewards_coefficient`. `pairs` says which pairs there are. The paper drops ties and does
    not say whether its divisor C(K, 2) shrinks with them; here it does. A ranking without a pair has loss 0.

    All pairs of a ranking are one element of the batch, as in the paper: lm-human-preferences cbfd210b takes a softmax
    over four responses instead, OpenRLHF 3c3be623 and TRL f2cd5771 take loose pairs, and DeepSpeed-Chat averages over
    all tokens after the responses part. Only differences count, but for `center`: see `reward_bias`.
    """
    compared = pairs(ranks, mask)
    lead = scores[:, :, None] - scores[:, None, :]
    losses = -logsigmoid(lead if margins is None else lead - margins)
    if center:
        losses = losses + center * (scores[:, :, None] + scores[:, None, :]) ** 2
    return torch.where(compared, losses, 0).sum(dim=(1, 2)) / compared.sum(dim=(1, 2)).clamp(min=1)


def reward_bias(scores: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """What to add to a reward model so that demonstrations score 0 on average, from its `scores` of B of them.

        bias = -mean(r)                                          (InstructGPT, arXiv:2203.02155, section 3.5)

    The rewards are shifted, not scaled: lm-human-preferences cbfd210b also gives them a standard deviation of 1.
    """
    return -scores.mean()


LOSSES: Shelf[Float[Tensor, "B T"]] = Shelf(
    "loss", [policy_gradient, clipped_surrogate, kl, nll, entropy, value_squared, value_clipped]
)
