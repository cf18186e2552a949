"""Label pieces: a reward for every response, and whether it is right where right and wrong exist."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int
from pydantic import Field

from pipeline.algorithms.shelf import Shelf


@dataclass(frozen=True)
class Labels:
    """What a labeler says of each response."""

    rewards: Float32[np.ndarray, " B"]
    verdicts: Float[np.ndarray, " B"]
    """What the labeler takes for right: 1.0 right, 0.0 wrong, NaN where it does not say."""
    target: Int[np.ndarray, " B"] | None = None
    """Class of equal answers (column `answers`) that each row was compared with, -1 for none; None: the reference."""
    vote_share: Float[np.ndarray, " B"] | None = None
    """Share of the group whose answer is this row's; 0 without an answer."""
    added_nothing: Bool[np.ndarray, " B"] | None = None
    """Where the response's own probability is too small to change the reward as it is stored; None: no such reward."""


def verifier(verdicts: Float[np.ndarray, " B"], *, correct: float = 1.0, wrong: float = 0.0) -> Labels:
    """One reward for right responses, another for all others.

        R_i = correct if response i is right, else wrong

    DAPO (arXiv:2503.14476, eq. 7) uses +1 and -1. Rows without a verdict get `wrong`; the stage does not train on them.
    """
    return Labels(np.where(verdicts == 1.0, correct, wrong).astype(np.float32), verdicts)


def reward_model(
    reward_scores: Float[np.ndarray, " B"], *, clip: Annotated[float, Field(gt=0)] | None = None
) -> Labels:
    """The reward model's score, which says nothing about right and wrong.

        R_i = min(max(score_i, -clip), clip), or score_i without `clip`

    InstructGPT (arXiv:2203.02155, section 3.5) shifts the scores so that demonstrations have 0 on average, which is
    done to the model, and bounds nothing. OpenRLHF 3c3be623 bounds by 10, but after a baseline has been subtracted;
    ReMax's code (536ba49c) bounds the difference to the greedy response by 5.
    """
    scores = reward_scores if clip is None else np.clip(reward_scores, -clip, clip)
    return Labels(scores.astype(np.float32), _no_verdicts(scores))


def majority_vote(
    answers: Int[np.ndarray, " B"],
    group: Int[np.ndarray, " B"],
    sample: Int[np.ndarray, " B"],
    *,
    correct: float = 1.0,
    wrong: float = 0.0,
) -> Labels:
    """Reward agreement with the most frequent answer to the same prompt (TTRL, arXiv:2504.16084).

        a* = mode of the answers of a group,   R_i = correct if a_i = a*, else wrong

    Votes are cast for classes of equal answers. Of equally frequent ones the winner is that whose first vote has the
    smallest sample number. No answer (-1) is no vote and never wins; a group without any vote has the target -1 and
    is wrong throughout. The greedy response, sample -1, does not vote but is compared like the others. `vote_share`
    is of all sampled responses, those without an answer included.

    TTRL's code (3e2cc937) votes over strings, so that 1/2 and 0.5 are rivals, and lets the empty string win.
    """
    _, place = np.unique(group, return_inverse=True)
    kind = np.unique(answers, return_inverse=True)[1]
    _, first_row, ballot = np.unique(place * len(answers) + kind, return_index=True, return_inverse=True)
    sampled = sample >= 0
    votes = sampled & (answers >= 0)
    counts = np.bincount(ballot[votes], minlength=len(first_row))
    earliest = np.full(len(first_row), np.iinfo(np.int64).max)
    np.minimum.at(earliest, ballot[votes], sample[votes])

    ranked = np.lexsort((earliest, -counts, place[first_row]))
    winner = ranked[np.unique(place[first_row][ranked], return_index=True)[1]]  # one per group, in their order
    won = np.zeros(len(first_row), bool)
    won[winner] = counts[winner] > 0
    right = won[ballot]
    target = np.where(won[winner], answers[first_row][winner], -1)
    size = np.maximum(np.bincount(place[sampled], minlength=len(winner)), 1)
    return Labels(
        np.where(right, correct, wrong).astype(np.float32),
        right.astype(np.float64),
        target=target[place],
        vote_share=counts[ballot] / size[place],
    )


def self_confidence(
    sampler_logprobs: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    alpha: Annotated[float, Field(ge=0)] = 0.1,
) -> Labels:
    """The probability that the policy itself gives to the response, plus a constant.

        R_i = exp( sum_t log p(a_i,t) ) + alpha                            (RLSC, arXiv:2506.06395v3, eq. 6)

    As a reward it is a number and not a function of the weights: times -log p it gives the paper's loss with its
    detached weight. p is the distribution that was sampled from, temperature included, as in the paper's algorithm 1.
    Summed, not averaged: long responses have tiny probabilities. The sum and its exp are float64, and 0 below about
    -745 nat; stored as float32 the probability no longer moves an alpha of 0.1 below about -19 nat, and without alpha
    it is 0 below about -104 nat. `added_nothing` marks the responses whose stored reward is alpha alone.
    """
    rewards = (likelihood(sampler_logprobs, mask) + alpha).astype(np.float32)
    return Labels(rewards, _no_verdicts(rewards), added_nothing=rewards == np.float32(alpha))


def likelihood(logprobs: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]) -> Float64[np.ndarray, " B"]:
    """Probability of each whole response: exp of the sum of its tokens' log-probabilities, both in float64."""
    return np.asarray(np.exp(np.where(mask, logprobs, 0).sum(axis=1, dtype=np.float64)))


def _no_verdicts(rewards: Float[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
    return np.full(len(rewards), np.nan)


LABELS: Shelf[Labels] = Shelf("label", [verifier, reward_model, majority_vote, self_confidence])
