"""How well a reward model agrees with people: over all comparisons, and over kinds of them. Pure arithmetic.

Shapes: P comparisons of two responses, B responses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from pipeline.grading.measures import clustered

Numbers = dict[str, tuple[float, str]]
"""Name -> value and unit."""

LENGTH_BINS = 5
RATING_BINS = 4
CONFIDENCE = np.linspace(0.5, 1.0, 11)
"""Edges of the bins of the probability that the model gives the side it prefers."""


@dataclass(frozen=True)
class Comparisons:
    """Pairs of responses of which somebody preferred one, and what the model says of them."""

    rankings: Sequence[str]
    """Ids of the rankings that the pairs are of."""
    better: Int[np.ndarray, " P"]
    """Place of the better response in its ranking."""
    worse: Int[np.ndarray, " P"]
    """Place of the worse one."""
    prompts: Sequence[str]
    annotators: Sequence[str]
    """Empty where nobody is named."""
    lead: Float[np.ndarray, " P"]
    """Score of the better response less that of the worse. [reward]"""
    rank_gap: Int[np.ndarray, " P"]
    """Rank of the worse response less that of the better; 1 or more."""
    rating_gap: Float[np.ndarray, " P"]
    """Rating of the better response less that of the worse; NaN without ratings."""
    length_gap: Int[np.ndarray, " P"]
    """Tokens of the better response less those of the worse."""

    @property
    def right(self) -> Float[np.ndarray, " P"]:
        """1 where the better response has the higher score, 1/2 where both have the same."""
        right: Float[np.ndarray, " P"] = (np.sign(self.lead) + 1) / 2
        return right

    def columns(self) -> dict[str, Any]:
        """As columns of a table."""
        return {
            "ranking_id": list(self.rankings), "better": self.better, "worse": self.worse,
            "prompt_id": list(self.prompts), "annotator": list(self.annotators), "lead": self.lead,
            "rank_gap": self.rank_gap, "rating_gap": self.rating_gap, "length_gap": self.length_gap,
            "right": self.right,
        }  # fmt: skip


def agreement(made: Comparisons) -> tuple[float, float]:
    """Share of the comparisons in which the better response has the higher score; its standard error over prompts."""
    return clustered(made.right, np.asarray(made.prompts))


def kinds(made: Comparisons) -> Numbers:
    """Accuracy by kind of comparison, with the number of each beside it.

    By length difference (`LENGTH_BINS` of about equal size); by difference of the ratings (`RATING_BINS`) where there
    are any; by difference of the ranks where there is more than one; by annotator where they have names.
    """
    numbers: Numbers = {}
    for low, high, rows in _quantiles(made.length_gap, LENGTH_BINS):
        numbers |= _share(made, f"length_gap/{low:+g}..{high:+g}", rows)
    rated = np.isfinite(made.rating_gap)
    if rated.any():
        for low, high, rows in _quantiles(made.rating_gap[rated], RATING_BINS):
            numbers |= _share(made, f"rating_gap/{low:g}..{high:g}", np.flatnonzero(rated)[rows])
    gaps = np.unique(made.rank_gap)
    if len(gaps) > 1:
        for gap in gaps:
            numbers |= _share(made, f"rank_gap/{gap}", made.rank_gap == gap)
    names = np.asarray(made.annotators)
    for name in sorted(set(made.annotators) - {""}):
        numbers |= _share(made, f"annotator/{name}", names == name)
    return numbers


def _share(made: Comparisons, name: str, rows: np.ndarray) -> Numbers:
    right = made.right[rows]
    return {f"accuracy/{name}": (float(right.mean()), "fraction"), f"pairs/{name}": (float(len(right)), "pairs")}


def _quantiles(values: np.ndarray, bins: int) -> Iterator[tuple[float, float, Bool[np.ndarray, " P"]]]:
    """Smallest and largest value of each bin, and its rows; a bin per value where there are few of them.

    Values that print the same are never in two bins, or two bins would have one name.
    """
    printed = np.array([float(f"{value:g}") for value in values])
    starts = np.unique(printed)
    if len(starts) > bins:
        starts = np.unique(np.quantile(printed, np.linspace(0, 1, bins, endpoint=False)))
    number = np.searchsorted(starts, printed, side="right") - 1
    for one in np.unique(number):
        rows = number == one
        yield float(printed[rows].min()), float(printed[rows].max()), rows


def calibration(made: Comparisons) -> Numbers:
    """Whether the model's probabilities are those of people's choices.

        p = sigmoid(|lead|)   of the side it prefers;   in bin b: mean p_b, share right o_b, number n_b
        calibration/error = sum_b n_b / P |o_b - p_b|

    The expected calibration error of Guo et al. (arXiv:1706.04599, eq. 3), over ten bins from 0.5 to 1.
    """
    p = 1 / (1 + np.exp(-np.abs(made.lead)))
    number = np.clip(np.digitize(p, CONFIDENCE) - 1, 0, len(CONFIDENCE) - 2)
    numbers: Numbers = {}
    error = 0.0
    for one in np.unique(number):
        rows = number == one
        predicted, observed = float(p[rows].mean()), float(made.right[rows].mean())
        error += rows.mean() * abs(observed - predicted)
        name = f"calibration/{CONFIDENCE[one]:.2f}-{CONFIDENCE[one + 1]:.2f}"
        numbers |= {
            f"{name}/predicted": (predicted, "fraction"), f"{name}/observed": (observed, "fraction"),
            f"{name}/pairs": (float(rows.sum()), "pairs"),
        }  # fmt: skip
    return {"calibration/error": (float(error), "fraction"), **numbers}


def length_bias(made: Comparisons, scores: Float[np.ndarray, " B"], lengths: Int[np.ndarray, " B"]) -> Numbers:
    """Whether the model prefers the longer response, and whether people do.

    Pearson's correlation of score and length over responses (0 where one of them does not vary); over comparisons of
    responses of different length, the share in which the longer one scores higher, and in which people preferred it.
    """
    varied = np.ptp(scores) > 0 and np.ptp(lengths) > 0
    numbers: Numbers = {
        "reward_scores/length_correlation": (float(np.corrcoef(scores, lengths)[0, 1]) if varied else 0.0, "")
    }
    differ = made.length_gap != 0
    if differ.any():
        better_is_longer = made.length_gap[differ] > 0
        right = made.right[differ]
        numbers |= {
            "longer/model": (float(np.where(better_is_longer, right, 1 - right).mean()), "fraction"),
            "longer/people": (float(better_is_longer.mean()), "fraction"),
        }
    return numbers


def measures(made: Comparisons, scores: Float[np.ndarray, " B"], lengths: Int[np.ndarray, " B"]) -> Numbers:
    """All of the above."""
    return {**kinds(made), **calibration(made), **length_bias(made, scores, lengths)}
