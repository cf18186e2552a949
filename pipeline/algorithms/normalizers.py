"""Normalize pieces: the scale of the credit. Their statistics are those of all rows handed over at once.

A piece whose statistics are of groups may be handed any whole groups. One whose statistics are of the whole iteration
is marked with how they are gathered over lots of rows, and takes what was gathered as its last column.
"""

from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from pipeline.algorithms.lots import each_lot, row_sums
from pipeline.algorithms.moments import Moments
from pipeline.algorithms.shelf import Shelf, gathered_by


def group_std(
    advantages: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    group: Int[np.ndarray, " B"],
    *,
    ddof: Literal[0, 1] = 1,
    eps: Annotated[float, Field(ge=0)] = 1e-6,
) -> Float[np.ndarray, "B T"]:
    """Divide by the standard deviation over the responses to the same prompt.

        A_i,t <- A_i,t / (std_{j in group of i}(a_j) + eps),   a_j = mean over the tokens of response j of A_j,t

    After `group_mean`, a_j = R_j - mean R, whose deviation is that of the rewards: together they are GRPO's
    (R_i - mean R) / std R (arXiv:2402.03300, section 4). The paper says neither n nor n-1 nor eps: all read have
    n-1, with an eps of 1e-6 in verl b178a3cd (the defaults here), 1e-4 in TRL f2cd5771 and 1e-9 in OpenRLHF 3c3be623.
    Equal rewards give 0, and so does a group that has lost all but one.
    """
    level = row_sums(advantages, mask) / np.maximum(mask.sum(axis=1), 1)
    _, index, sizes = np.unique(group, return_inverse=True, return_counts=True)
    mean = np.bincount(index, weights=level) / sizes
    squares = np.bincount(index, weights=(level - mean[index]) ** 2)
    std = np.sqrt(squares / np.maximum(sizes - ddof, 1))[index, None]
    divisor = np.where(std + eps > 0, std + eps, 1.0)
    scaled = np.zeros_like(advantages)

    def fill(lot: slice) -> None:
        scaled[lot] = np.where(mask[lot], advantages[lot] / divisor[lot], 0.0)

    each_lot(mask.shape, fill)
    return scaled


def moments_of(
    advantages: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], *, over: Literal["tokens", "responses"]
) -> Moments:
    """Those of all tokens, or of the means over the tokens of each response that has any."""
    if over == "tokens":
        return Moments.of(advantages[mask])
    counts = mask.sum(axis=1)
    return Moments.of(row_sums(advantages, mask)[counts > 0] / counts[counts > 0])


@gathered_by(moments_of)
def whiten(
    advantages: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    gathered: Moments | None = None,
    *,
    ddof: Literal[0, 1] = 1,
    eps: Annotated[float, Field(gt=0)] = 1e-8,
    center: bool = True,
    over: Literal["tokens", "responses"] = "tokens",
) -> Float[np.ndarray, "B T"]:
    """Shift and scale to mean 0 and variance 1 over all of the iteration.

        A <- (A - m) / sqrt(v + eps) (+ m without `center`)
        over = tokens:      m, v of all tokens' A_i,t, so that long responses weigh more
        over = responses:   m, v of a_i = mean over the tokens of response i of A_i,t

    verl b178a3cd and TRL f2cd5771 take tokens and n-1 (`ddof = 1`); OpenRLHF 3c3be623 takes tokens and n and keeps v
    above 1e-8 instead of adding that; lm-human-preferences cbfd210b takes n, and for rewards keeps the mean.
    REINFORCE++ normalizes over all samples (arXiv:2501.03262v9, appendix B.2), which reads as responses; its authors'
    code takes tokens. After `group_mean` a group with equal rewards then gets credit: the mean over tokens is not 0.

    Without `center` the mean stays. Equal credit becomes its mean: 0, or itself where the mean stays.

    `gathered` holds m and v where these are not all rows: the sum of `moments_of` over the lots that make up all.
    """
    moments = moments_of(advantages, mask, over=over) if gathered is None else gathered
    scale = np.sqrt(moments.variance(ddof) + eps)
    whitened = np.zeros_like(advantages)

    def fill(lot: slice) -> None:
        scaled = advantages[lot].astype(np.float64)
        scaled -= moments.mean
        scaled /= scale
        scaled += 0.0 if center else moments.mean
        np.copyto(whitened[lot], scaled, where=mask[lot], casting="same_kind")

    each_lot(mask.shape, fill)
    return whitened


NORMALIZERS: Shelf[Float[np.ndarray, "B T"]] = Shelf("normalize", [group_std, whiten])
