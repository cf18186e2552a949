"""Rows to optimizer steps and from there to what fits in memory, all a function of the seed."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from pipeline.seeds import derive

Rows = Int[np.ndarray, " N"]

MOST_PADDING = 0.1
"""Share of a micro-batch's tokens; how it was chosen stands in tests/benchmarks/README.md."""


def shuffled(count: int, seed: int, epoch: int) -> Rows:
    """The rows 0..count-1 in the order of one epoch."""
    return np.random.default_rng(derive(seed, "epoch", epoch)).permutation(count)


def dealt(count: int, epochs: int, minibatches: int, seed: int) -> list[Rows]:
    """The rows of every optimizer step: each epoch deals the rows 0..count-1, in its own order, to `minibatches` steps.

    Their sizes differ by at most one; empty ones are left out.
    """
    orders = (shuffled(count, seed, epoch) for epoch in range(epochs))
    return [part for order in orders for part in np.array_split(order, minibatches) if len(part)]


def drawn(count: int, start: int, wanted: int, seed: int) -> Rows:
    """`wanted` rows from place `start` of an endless stream: the rows 0..count-1 again and again, shuffled each time.

    Whoever goes on at `start + wanted` sees every row equally often.
    """
    passes = range(start // count, -(-(start + wanted) // count))
    orders = [shuffled(count, seed, number) for number in passes]
    skipped = start % count
    return np.concatenate([np.zeros(0, dtype=np.int64), *orders])[skipped : skipped + wanted]


def held_out(prompt_ids: Sequence[str], share: float, seed: int) -> Bool[np.ndarray, " M"]:
    """True on the rows of prompts that are not trained on; all draws of a prompt (`#1`, `#2`) go the same way.

    A prompt is held out if its random number, a function of seed and id, is below `share`; of two prompts or more at
    least one is then held out, and at least one is not.
    """
    prompts = [name.partition("#")[0] for name in prompt_ids]
    drawn = {name: derive(seed, "held out", name) / 2**63 for name in prompts}
    ordered = sorted(drawn, key=lambda name: drawn[name])
    count = sum(number < share for number in drawn.values())
    if share > 0:
        count = min(max(count, 1), len(ordered) - 1)
    kept_back = set(ordered[:count])
    return np.array([name in kept_back for name in prompts], dtype=bool)


def micro_batches(
    rows: Rows, lengths: Int[np.ndarray, " M"], budget: int, padding: float = MOST_PADDING
) -> Iterator[Rows]:
    """Cut one step's rows into runs of similar length, with at most `budget` tokens and little padding.

    `lengths[row]` is the number of tokens of a row. Of a run's padded size at most `padding` is none of them. A row
    longer than the budget goes alone. Longest first, so that a budget that does not fit into memory fails at once.
    """
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    tokens = np.cumsum(np.concatenate([[0], lengths[order]]))
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        fitting = max(1, budget // longest)
        counts = np.arange(1, min(fitting, len(order) - start) + 1)
        # The share of padding only grows with the count: rows get shorter.
        dense = tokens[start + counts] - tokens[start] >= (1 - padding) * longest * counts
        taken = max(1, int(dense.sum()))
        yield order[start : start + taken]
        start += taken
