"""Advantage pieces: from the rewards of tokens to the credit of tokens.

Sums over tokens and means over groups are taken in float64 whatever the rewards are stored in, so that equal rewards
give a credit of exactly 0; results have the rewards' own type.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

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
    return _on_every_token(_totals(rewards, mask), rewards, mask)


def group_mean(
    rewards: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], group: Int[np.ndarray, " B"]
) -> Credit:
    """Reward minus the mean reward of the responses to the same prompt.

        A_i,t = R_i - mean_{j in group of i} R_j,   R_i = sum_t r_i,t

    The centring of GRPO (Shao et al. 2024, arXiv:2402.03300, section 4; `group_std` divides) and, alone, of
    Dr. GRPO (arXiv:2503.20783). A response whose group has lost all others gets 0.
    """
    totals = _totals(rewards, mask)
    index, sizes, sums = _groups(totals, group)
    return _on_every_token(totals - (sums / sizes)[index], rewards, mask)


def leave_one_out(
    rewards: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], group: Int[np.ndarray, " B"]
) -> Credit:
    """Reward minus the mean reward of the *other* responses to the same prompt.

        A_i,t = R_i - 1/(G-1) * sum_{j != i} R_j   (Ahmadian et al. 2024, arXiv:2402.14740, section 2.3)

    Equals `group_mean` times G/(G-1). A response whose group has lost all others gets 0.
    """
    totals = _totals(rewards, mask)
    index, sizes, sums = _groups(totals, group)
    others = sizes[index] - 1
    baseline = (sums[index] - totals) / np.maximum(others, 1)
    return _on_every_token(np.where(others > 0, totals - baseline, 0.0), rewards, mask)


def _totals(rewards: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]) -> Float[np.ndarray, " B"]:
    return np.asarray(np.where(mask, rewards, 0).sum(axis=1, dtype=np.float64))


def _groups(
    totals: Float[np.ndarray, " B"], group: Int[np.ndarray, " B"]
) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " groups"], Float[np.ndarray, " groups"]]:
    """Each row's place in the list of groups; each group's size and sum."""
    _, index, sizes = np.unique(group, return_inverse=True, return_counts=True)
    return index, sizes, np.bincount(index, weights=totals)


def _on_every_token(
    credit: Float[np.ndarray, " B"], rewards: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]
) -> Credit:
    return Credit(np.where(mask, credit[:, None], 0.0).astype(rewards.dtype))


ADVANTAGES: Shelf[Credit] = Shelf("advantage", [outcome, group_mean, leave_one_out])
