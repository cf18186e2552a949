"""Advantage pieces: from the rewards of tokens to the credit of tokens.

Sums over tokens, means over groups and recursions over time are float64 whatever the rewards are stored in, so that
equal rewards give a credit of exactly 0; results have the rewards' own type and are 0 where the mask is False.

The mask may have holes: tokens inside a response that the policy did not write. They earn nothing, and recursions pass
over them as if they were not there, as verl b178a3cd and NeMo-RL 7ea279ab do in their generalised advantages. OpenRLHF
3c3be623 sets value and reward to 0 there and goes on step by step, which loses the next value and pays for the step.
A response that was cut at the length limit ends where it was cut: no value is put behind it (all systems read agree).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from pydantic import Field

from pipeline.algorithms.lots import each_lot, row_sums
from pipeline.algorithms.shelf import Shelf


@dataclass(frozen=True)
class Credit:
    """What each token earned."""

    advantages: Float[np.ndarray, "B T"]
    returns: Float[np.ndarray, "B T"] | None = None
    """What a critic should predict; None where there is no critic to teach."""


def outcome(rewards: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]) -> Credit:
    """The reward of the response, on every token.

        A_i,t = R_i = sum_t r_i,t

    REINFORCE without a baseline.
    """
    return _on_every_token(row_sums(rewards, mask), rewards, mask)


def group_mean(
    rewards: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], group: Int[np.ndarray, " B"]
) -> Credit:
    """Reward minus the mean reward of the responses to the same prompt.

        A_i,t = R_i - mean_{j in group of i} R_j,   R_i = sum_t r_i,t

    The centring of GRPO (Shao et al. 2024, arXiv:2402.03300, section 4; `group_std` divides) and, alone, of
    Dr. GRPO (arXiv:2503.20783). A response whose group has lost all others gets 0, as in TRL f2cd5771; verl b178a3cd
    gives it its reward, OpenRLHF 3c3be623 refuses it.
    """
    index, sizes, apart, sums = _groups(row_sums(rewards, mask), group)
    return _on_every_token(apart - (sums / sizes)[index], rewards, mask)


def leave_one_out(
    rewards: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], group: Int[np.ndarray, " B"]
) -> Credit:
    """Reward minus the mean reward of the *other* responses to the same prompt.

        A_i,t = R_i - 1/(G-1) * sum_{j != i} R_j   (Ahmadian et al. 2024, arXiv:2402.14740, section 2.3)

    Equals `group_mean` times G/(G-1). A response whose group has lost all others gets 0. R_i holds what shaping has
    added to it: with `kl_penalty` the divergence is in the baseline too, as in the paper, verl b178a3cd and TRL
    f2cd5771; OpenRLHF 3c3be623 keeps it out.
    """
    index, sizes, apart, sums = _groups(row_sums(rewards, mask), group)
    others = sizes[index] - 1
    baseline = (sums[index] - apart) / np.maximum(others, 1)
    return _on_every_token(np.where(others > 0, apart - baseline, 0.0), rewards, mask)


def greedy_baseline(
    rewards: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    greedy: Float[np.ndarray, " B"],
    *,
    credit: Literal["response", "to_go"] = "response",
) -> Credit:
    """Reward minus the reward of the greedy response to the same prompt (ReMax, arXiv:2310.10505).

        response:   A_i,t = sum_u r_i,u - greedy_i
        to_go:      A_i,t = sum_{u >= t} r_i,u - greedy_i

    The same on every token as in the paper, or as in verl b178a3cd, where tokens are not credited with what came before
    them; they differ where shaping rewards tokens before the last. `greedy` is the labeler's reward, without shaping.
    ReMax's code (536ba49c) discounts by 0.99, the last token too, and takes off the token's own divergence.
    """
    if credit == "response":
        return _on_every_token(row_sums(rewards, mask) - greedy, rewards, mask)
    advantages = np.zeros_like(rewards)

    def fill(lot: slice) -> None:
        to_go = _discounted(rewards[lot], mask[lot], 1.0)
        advantages[lot] = np.where(mask[lot], to_go - greedy[lot, None], 0.0)

    each_lot(mask.shape, fill)
    return Credit(advantages)


def reward_to_go(
    rewards: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0,
) -> Credit:
    """The sum of the rewards from each token on; the returns are the same, the Monte-Carlo ones.

        A_i,t = R_i,t = sum_{u >= t} gamma^(u-t) r_i,u

    With `kl_penalty` it is REINFORCE++'s r - beta * sum_{u >= t} k1_u (arXiv:2501.03262v9, eq. 4; `whiten` normalizes);
    gamma is 1 there and in all scripts, earlier versions allowed less. u - t counts the tokens of the policy. verl
    b178a3cd lets no credit of REINFORCE++ cross a hole in the mask; since 8a1bf6d5b it crosses, as here.
    """
    to_go = np.zeros_like(rewards)

    def fill(lot: slice) -> None:
        to_go[lot] = _discounted(rewards[lot], mask[lot], gamma)

    each_lot(mask.shape, fill)
    return Credit(to_go, to_go)


def gae(
    rewards: Float[np.ndarray, "B T"],
    values: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0,
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95,
    critic_lam: Annotated[float, Field(ge=0, le=1)] | None = None,
    adapt: Annotated[float, Field(gt=0)] | None = None,
) -> Credit:
    """Generalised advantage estimation, with a lambda of its own for the critic and one per response as settings.

        delta_t = r_t + gamma * V_(t+1) - V_t                              V behind the last token is 0
        A_t     = delta_t + gamma * lam * A_(t+1)
        R_t     = A'_t + V_t                                               A' is A with `critic_lam` for lam

    Schulman et al. (arXiv:1506.02438). `values` are those of the critic before the update. The returns are made of raw
    advantages: a normalizer comes later and leaves them alone, as in lm-human-preferences, TRL f2cd5771 and verl
    b178a3cd. Without `critic_lam` the critic has the lambda of the advantages, whichever that is.

    VC-PPO (arXiv:2503.01491) and VAPO (arXiv:2504.05118v3, section 4.1) decouple the two: critic_lam = 1, whose returns
    are Monte-Carlo. With `adapt` each response has, instead of `lam`,

        lam_i = max(1 - 1 / (adapt * |y_i|), 0)                            (VAPO, eq. 5, adapt = 0.05)

    so that the coefficients of the TD errors sum to about adapt * |y_i|; the paper does not say what happens where this
    is negative, NeMo-RL 7ea279ab and AReaL 13800d33 bound it by 0. |y_i| counts the tokens that the mask holds.

    lm-human-preferences and TRL have lam = 0.95, verl and OpenRLHF 3c3be623 have 1 unless told otherwise.
    """
    advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)

    def fill(lot: slice) -> None:
        here = mask[lot]
        per_row = np.full(len(here), lam)
        if adapt is not None:
            per_row = np.maximum(1 - 1 / (adapt * np.maximum(here.sum(axis=1), 1)), 0.0)
        advantage = taught = _estimated(rewards[lot], values[lot], here, gamma, per_row)
        if critic_lam is not None:
            taught = _estimated(rewards[lot], values[lot], here, gamma, np.full(len(here), critic_lam))
        advantages[lot] = advantage
        returns[lot] = np.where(here, taught + values[lot], 0.0)

    each_lot(mask.shape, fill)
    return Credit(advantages, returns)


def _groups(
    totals: Float[np.ndarray, " B"], group: Int[np.ndarray, " B"]
) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " groups"], Float[np.ndarray, " B"], Float[np.ndarray, " groups"]]:
    """Each row's place in the list of groups; their sizes; each row's distance to the first of its group; their sums.

    Means are taken of distances: those of equal rewards are exactly 0, where a mean of rewards is only nearly theirs.
    """
    _, first, index, sizes = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    apart = totals - totals[first][index]
    return index, sizes, apart, np.bincount(index, weights=apart)


def _on_every_token(
    credit: Float[np.ndarray, " B"], rewards: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]
) -> Credit:
    advantages = np.zeros_like(rewards)
    each = credit.astype(rewards.dtype)[:, None]
    each_lot(mask.shape, lambda lot: np.copyto(advantages[lot], each[lot], where=mask[lot]))
    return Credit(advantages)


def _discounted(
    rewards: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], gamma: float
) -> Float64[np.ndarray, "B T"]:
    """Sum of the rewards from each token on; 0 where the mask is False."""
    return _estimated(rewards, None, mask, gamma, np.ones(len(mask)))


def _estimated(
    rewards: Float[np.ndarray, "B T"],
    values: Float[np.ndarray, "B T"] | None,
    mask: Bool[np.ndarray, "B T"],
    gamma: float,
    lam: Float64[np.ndarray, " B"],
) -> Float64[np.ndarray, "B T"]:
    """Generalised advantages, a lambda per row; 0 where the mask is False. Without values they are 0."""
    decay = gamma * lam
    if (mask[:, 1:] > mask[:, :-1]).any():
        return _over_holes(rewards, np.zeros_like(rewards) if values is None else values, mask, gamma, decay)
    # One row per token: all responses at a token then lie side by side, and so do those at the next one.
    advantages = _by_token(rewards, mask)
    if values is not None:
        value = _by_token(values, mask)
        advantages[:-1] += gamma * value[1:]
        advantages -= value
    fades = bool((decay != 1.0).any())
    advantages[-1:] += 0.0  # as adding what comes behind the last token does: -0 becomes 0
    for t in reversed(range(len(advantages) - 1)):
        behind = advantages[t + 1]
        advantages[t] += decay * behind if fades else behind
    return np.ascontiguousarray(advantages.T)


def _by_token(column: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]) -> Float64[np.ndarray, "T B"]:
    return np.ascontiguousarray(np.where(mask, column, column.dtype.type(0)).T, dtype=np.float64)


def _over_holes(
    rewards: Float[np.ndarray, "B T"],
    values: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    gamma: float,
    decay: Float64[np.ndarray, " B"],
) -> Float64[np.ndarray, "B T"]:
    advantages = np.zeros(mask.shape)
    next_value, advantage = np.zeros(len(mask)), np.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):
        value, here = values[:, t].astype(np.float64), mask[:, t]
        estimate = rewards[:, t] + gamma * next_value - value + decay * advantage
        next_value, advantage = np.where(here, value, next_value), np.where(here, estimate, advantage)
        advantages[here, t] = estimate[here]
    return advantages


ADVANTAGES: Shelf[Credit] = Shelf("advantage", [outcome, group_mean, leave_one_out, greedy_baseline, reward_to_go, gae])
