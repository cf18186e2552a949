"""Rows to optimizer steps and from there to what fits in memory, all a function of the seed."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from pipeline.seeds import derive

Rows = Int[np.ndarray, " N"]


def shuffled(count: int, seed: int, epoch: int) -> Rows:
    """The rows 0..count-1 in the order of one epoch."""
    return np.random.default_rng(derive(seed, "epoch", epoch)).permutation(count)


def minibatches(rows: Rows, parts: int) -> Iterator[Rows]:
    """Deal rows into `parts` optimizer steps whose sizes differ by at most one; empty ones are left out."""
    return (part for part in np.array_split(rows, parts) if len(part))


def micro_batches(rows: Rows, lengths: Int[np.ndarray, " M"], budget: int) -> Iterator[Rows]:
    """Cut one step's rows into runs of similar length whose padded size stays under `budget` tokens.

    `lengths[row]` is the number of tokens of a row. A row longer than the budget goes alone. Longest first, so
    that a budget that does not fit into memory fails at once.
    """
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    start = 0
    while start < len(order):
        fitting = max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start : start + fitting]
        start += fitting
