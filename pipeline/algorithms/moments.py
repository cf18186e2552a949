"""Mean and spread of numbers that come in lots: what can be said of all rows without holding them all."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Moments:
    """Number, mean, and sum of the squared distances to the mean; float64. Those of two lots add up to those of both.

        n = n_a + n_b      d = m_b - m_a      m = m_a + d n_b / n      S = S_a + S_b + d^2 n_a n_b / n

    Chan, Golub, LeVeque 1983 (The American Statistician 37(3)). Of a single lot they are to the last bit what NumPy
    says of it. An addition is off by half a unit in the last place (u = 2^-53) of its result at most, so k lots give a
    mean that is off by no more than about 2 k u max|m|, and S by 4 k u S, beyond NumPy's own error. Of ten million rows
    in lots of 4096, k = 2442 and both stay below 1e-12 of the scale, where a float32 tells 6e-8 apart.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Float[np.ndarray, " N"]) -> "Moments":
        """Of one lot, which may be empty."""
        if not values.size:
            return cls()
        numbers = np.array(values, np.float64)
        mean = numbers.mean()
        numbers -= mean
        numbers *= numbers
        return cls(numbers.size, float(mean), float(numbers.sum()))

    def __add__(self, other: "Moments") -> "Moments":
        if not self.count or not other.count:
            return self if self.count else other
        count, apart = self.count + other.count, other.mean - self.mean
        share = other.count / count
        return Moments(
            count, self.mean + apart * share, self.squares + other.squares + apart**2 * self.count * share
        )  # fmt: skip

    def variance(self, ddof: int = 0) -> float:
        """S / (n - ddof), and S where that would divide by less than 1."""
        return self.squares / max(self.count - ddof, 1)

    @property
    def std(self) -> float:
        """Of the numbers as a population."""
        return float(np.sqrt(self.variance()))
