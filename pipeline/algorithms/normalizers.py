"""Normalize pieces: the scale of the credit. Their statistics are those of all rows handed over at once."""

from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from pipeline.algorithms.shelf import Shelf


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
    (R_i - mean R) / std R (arXiv:2402.03300, section 4). The paper says neither n nor n-1 nor eps; the defaults are
    those of verl b178a3cd, n-1 and 1e-6. Equal rewards give 0, and so does a group that has lost all but one.
    """
    level = np.where(mask, advantages, 0).sum(axis=1, dtype=np.float64) / np.maximum(mask.sum(axis=1), 1)
    _, index, sizes = np.unique(group, return_inverse=True, return_counts=True)
    mean = np.bincount(index, weights=level) / sizes
    squares = np.bincount(index, weights=(level - mean[index]) ** 2)
    std = np.sqrt(squares / np.maximum(sizes - ddof, 1))[index, None]
    divisor = np.where(std + eps > 0, std + eps, 1.0)
    return np.where(mask, advantages / divisor, 0.0).astype(advantages.dtype)


def whiten(
    advantages: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    *,
    ddof: Literal[0, 1] = 1,
    eps: Annotated[float, Field(gt=0)] = 1e-8,
) -> Float[np.ndarray, "B T"]:
    """Shift and scale to mean 0 and variance 1 over all response tokens of the iteration.

        A <- (A - mean A) / sqrt(var A + eps)

    Long responses weigh more: each token counts once. `ddof = 1` divides the squares by n-1 as verl and TRL do, 0 by n
    as OpenRLHF and lm-human-preferences do. Equal credit gives 0.
    """
    tokens = advantages[mask].astype(np.float64)
    if not tokens.size:
        return np.zeros_like(advantages)
    centred = tokens - tokens.mean()
    variance = (centred**2).sum() / max(tokens.size - ddof, 1)
    whitened = np.zeros_like(advantages)
    whitened[mask] = centred / np.sqrt(variance + eps)
    return whitened


NORMALIZERS: Shelf[Float[np.ndarray, "B T"]] = Shelf("normalize", [group_std, whiten])
