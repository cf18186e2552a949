"""Label pieces: a reward for every response, and whether it is right where right and wrong exist."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from pipeline.algorithms.shelf import Shelf


@dataclass(frozen=True)
class Labels:
    """What a labeler says of each response."""

    rewards: Float32[np.ndarray, " B"]
    verdicts: Float[np.ndarray, " B"]
    """1.0 right, 0.0 wrong, NaN without a verdict."""


def verifier(verdicts: Float[np.ndarray, " B"], *, correct: float = 1.0, wrong: float = 0.0) -> Labels:
    """One reward for right responses, another for all others.

        R_i = correct if response i is right, else wrong

    DAPO (arXiv:2503.14476, eq. 7) uses +1 and -1. Rows without a verdict get `wrong`; the stage does not train on them.
    """
    return Labels(np.where(verdicts == 1.0, correct, wrong).astype(np.float32), verdicts)


LABELS: Shelf[Labels] = Shelf("label", [verifier])
