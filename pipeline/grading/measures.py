"""What the judgements and the votes of one group say together: metric -> value."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pipeline.grading import Judgement


def accuracies(gold: Sequence[Judgement | None]) -> dict[str, float]:
    """Of one group: share of right responses, whether any is right, whether the majority is. Empty without verdicts."""
    judged = [judgement for judgement in gold if judgement is not None]
    right = [judgement.correct for judgement in judged if judgement.correct is not None]
    if not right:
        return {}
    return {
        "accuracy/mean": float(np.mean(right)),
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
