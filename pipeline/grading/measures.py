"""What the judgements and the votes of one group say together, and what many groups say of a policy."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from pipeline.grading import Judgement


def accuracies(gold: Sequence[Judgement | None]) -> dict[str, float]:
    """Of one group: share of right responses, whether any is right, whether the majority is. Empty without verdicts."""
    judged = [judgement for judgement in gold if judgement is not None]
    right = [judgement.correct for judgement in judged if judgement.correct is not None]
    if not right:
        return {}
    return {
        "accuracy/mean": sum(right) / len(right),
        "accuracy/pass_at_k": float(any(right)),
        "accuracy/majority_at_k": float(majority_right(judged)),
    }


def majority_right(judgements: Sequence[Judgement]) -> bool:
    """Is the most frequent answer of a group (the earliest of equals) the right one? Nothing found is no vote."""
    votes = Counter(judgement.extracted for judgement in judgements if judgement.extracted is not None)
    right = {judgement.extracted: bool(judgement.correct) for judgement in judgements}
    return bool(votes) and right[votes.most_common(1)[0][0]]


def election(classes: Int[np.ndarray, " G"], target: int, gold: Sequence[Judgement | None]) -> dict[str, float]:
    """Of one group: how its vote went, and whether the answer that won is right where that is known.

        majority_ratio = votes of the winner / responses        entropy = - sum_c p_c log p_c over voters [nat]

    A group without votes has a majority ratio of 0, no entropy, and a label that is not right.
    """
    counts = np.bincount(classes[classes >= 0])
    counts = counts[counts > 0]
    numbers = {"vote/no_answer": float(not counts.size)}
    numbers["vote/majority_ratio"] = float(np.mean(classes == target)) if target >= 0 else 0.0
    numbers["vote/tie_rate"] = float(counts.size > 0 and np.sum(counts == counts.max()) > 1)
    if counts.size:
        shares = counts / counts.sum()
        numbers["vote/entropy"] = float(-(shares * np.log(shares)).sum())
    known = [judgement.correct for judgement in gold if judgement is not None and judgement.correct is not None]
    winner = [gold[row] for row in np.flatnonzero(classes == target).tolist()] if target >= 0 else []
    right = [judgement.correct for judgement in winner if judgement is not None and judgement.correct is not None]
    if right or (known and not winner):
        numbers["vote/label_accuracy"] = float(bool(right) and bool(right[0]))
    return numbers


def clustered(values: Float[np.ndarray, " N"], groups: Shaped[np.ndarray, " N"]) -> tuple[float, float]:
    """The mean over rows, and its standard error where only the rows of different groups are independent.

        m = sum_i x_i / N      e_g = sum_{i in g} (x_i - m)      se = sqrt(G / (G - 1) sum_g e_g^2) / N

    Responses to one prompt are right or wrong together: rows are no sample of their own (arXiv:2411.00640).
    With groups of equal size it is the standard error of the mean of the G group means. NaN where G < 2.
    """
    mean = float(values.mean())
    excess = np.bincount(np.unique(groups, return_inverse=True)[1], weights=values - mean)
    if len(excess) < 2:
        return mean, float("nan")
    return mean, float(np.sqrt(len(excess) / (len(excess) - 1) * (excess**2).sum()) / len(values))


@dataclass(frozen=True)
class Duel:
    """How the responses of one policy do against those of another to the same prompts. All but `prompts` in [0, 1]."""

    rate: float
    """Probability that ours beats theirs, ties counted one half."""
    error: float
    """Standard error of `rate`, over prompts; NaN with a single prompt."""
    wins: float
    """Share of pairs in which ours is better; with `ties` and `losses` it adds up to 1."""
    ties: float
    """Share of pairs that are equal."""
    losses: float
    """Share of pairs in which theirs is better."""
    prompts: int
    """Prompts that both answered."""

    @property
    def decided(self) -> float | None:
        """Share of wins among the pairs that are no tie; None where all are."""
        return None if self.wins + self.losses == 0 else self.wins / (self.wins + self.losses)


def win_rate(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> Duel:
    """Draw a prompt, and a response of either side to it: how often is ours the better one?

    Prompt -> the verdicts, or any other marks, of its responses; a and b are those of a prompt that both sides have.

        w_p = mean_{i,j} 1[a_i > b_j]      t_p = mean_{i,j} 1[a_i = b_j]      l_p = mean_{i,j} 1[a_i < b_j]
        rate = mean_p r_p,   r_p = w_p + t_p / 2      error = sqrt(sum_p (r_p - rate)^2 / (P - 1) / P)

    All pairs of a prompt are compared, so rate(ours, theirs) + rate(theirs, ours) = 1, and 1/2 against oneself. Raises
    `ValueError` when the two sides have no prompt in common.
    """
    shared = [prompt for prompt in ours if prompt in theirs]
    if not shared:
        raise ValueError("no prompt that both sides answered")
    signs = [np.sign(np.subtract.outer(np.asarray(ours[p], float), np.asarray(theirs[p], float))) for p in shared]
    wins, ties, losses = (np.array([(sign == wanted).mean() for sign in signs]) for wanted in (1, 0, -1))
    rate, error = clustered(wins + ties / 2, np.arange(len(shared)))
    return Duel(rate, error, float(wins.mean()), float(ties.mean()), float(losses.mean()), len(shared))
