"""How much of the returns a critic explains, and when it no longer learns to explain more. Pure arithmetic.

Shapes: B responses, T response tokens, N tokens. Everything is computed in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Bool, Float


def explained_variance(values: Float[np.ndarray, " N"], returns: Float[np.ndarray, " N"]) -> float:
    """Share of the variance of the returns that the values account for.

        EV = 1 - Var(R - V) / Var(R)                                       population variances

    1: right up to a constant; 0: no better than any constant; below 0: worse. A constant offset does not show here, it
    shows in the loss. Where all returns are equal there is nothing to explain, and EV is 0. VC-PPO (arXiv:2503.01491)
    watches it during value pretraining and prints no formula.
    """
    if not np.ptp(returns):
        return 0.0
    wanted = np.asarray(returns, dtype=np.float64)
    return float(1 - np.var(wanted - values) / np.var(wanted))


@dataclass(frozen=True)
class Explained:
    """How well values predict returns."""

    loss: float
    """0.5 * mean (V - R)^2 over tokens, in squared units of the reward."""
    variance: float
    """Explained variance over all tokens."""
    by_position: Mapping[int, float]
    """First position -> explained variance of the tokens from there on: positions 0, 1, 2-3, 4-7, 8-15 and so on.

    Positions count from 0 at the first token of a response. Those whose returns are all equal are left out.
    """

    @classmethod
    def of(
        cls, values: Float[np.ndarray, "B T"], returns: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]
    ) -> Self:
        """Compare values and returns where `mask` is True; there is at least one such token."""
        found, wanted = (np.asarray(array[mask], dtype=np.float64) for array in (values, returns))
        position = np.nonzero(mask)[1]
        start = np.where(position == 0, 0, 1 << np.frexp(np.maximum(position, 1))[1] - 1)
        by_position = {
            int(first): explained_variance(found[start == first], wanted[start == first])
            for first in np.unique(start)
            if np.ptp(wanted[start == first])
        }
        return cls(float(0.5 * np.mean((found - wanted) ** 2)), explained_variance(found, wanted), by_position)


@dataclass
class Convergence:
    """Remembers the best loss and the best explained variance, and how long neither has become better."""

    loss: float
    """The best so far; at first, of the untrained critic."""
    variance: float
    """Likewise."""
    min_gain: float
    """The loss gains when it falls by more than this share of itself, the variance when it rises by more than this."""
    patience: int
    """Checks in a row without a gain after which it is reached."""
    stale: int = 0
    """Checks in a row without a gain so far."""

    def reached(self, found: Explained) -> bool:
        """Take note of a check; True when neither has gained for `patience` checks."""
        lower = found.loss < self.loss * (1 - self.min_gain)
        higher = found.variance > self.variance + self.min_gain
        if lower:
            self.loss = found.loss
        if higher:
            self.variance = found.variance
        self.stale = 0 if lower or higher else self.stale + 1
        return self.stale >= self.patience
