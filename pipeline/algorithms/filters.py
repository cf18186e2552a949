"""Filter pieces: which rows train, and the reason that is written beside the others."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from pipeline.algorithms.shelf import Shelf


@dataclass(frozen=True)
class Kept:
    """A filter's decision."""

    keep: Bool[np.ndarray, " B"]
    reason: str
    """Why the rows with `keep` False are dropped."""


def mixed_outcomes(verdicts: Float[np.ndarray, " B"], group: Int[np.ndarray, " B"]) -> Kept:
    """Keep the groups that hold both a right and a wrong response.

        0 < #{i in group : response i is right} < #{i in group : response i has a verdict}

    The constraint of DAPO (arXiv:2503.14476, eq. 8; dynamic sampling, section 3.2). It counts verdicts and never looks
    at shaped rewards, whose spread may come from lengths or rounding. A row without a verdict is no outcome; it shares
    its group's fate here.

    verl's DAPO (v0.5.x, 3392f3b6) asks for a deviation of the accuracies above 0, which says the same, and keeps groups
    of one; OpenRLHF 3c3be623 asks for a mean score between two bounds; TRL f2cd5771 has no such filter.
    """
    _, index = np.unique(group, return_inverse=True)
    right = np.bincount(index, weights=verdicts == 1.0)
    wrong = np.bincount(index, weights=verdicts == 0.0)
    return Kept(((right > 0) & (wrong > 0))[index], "constant outcomes")


def first(sample: Int[np.ndarray, " B"], *, n: Annotated[int, Field(ge=1)]) -> Kept:
    """Keep the first `n` sampled responses of every group: 0 <= sample < n.

    The greedy response, sample -1, is none of them.
    """
    return Kept((sample >= 0) & (sample < n), f"beyond first {n}")


def drawn(
    sample: Int[np.ndarray, " B"],
    group: Int[np.ndarray, " B"],
    lottery: Float[np.ndarray, " B"],
    *,
    n: Annotated[int, Field(ge=1)],
) -> Kept:
    """Keep `n` sampled responses of every group, drawn at random: those with the smallest numbers in the lottery.

    TTRL's code (3e2cc937) trains on the first ones, `first`. The greedy response, sample -1, takes no part. A group
    with fewer responses keeps all. Equal numbers are decided by the sample number.
    """
    sampled = sample >= 0
    order = np.lexsort((sample, lottery, ~sampled, group))
    _, starts, sizes = np.unique(group[order], return_index=True, return_counts=True)
    keep = np.zeros(len(sample), bool)
    keep[order] = np.arange(len(sample)) - np.repeat(starts, sizes) < n
    return Kept(keep & sampled, f"not among {n} drawn")


FILTERS: Shelf[Kept] = Shelf("filter", [mixed_outcomes, first, drawn])
