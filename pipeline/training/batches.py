"""Rows to optimizer steps and from there to what fits in memory, all a function of the seed."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Bool, Int

from pipeline import packing
from pipeline.models.device import device
from pipeline.seeds import derive

Rows = Int[np.ndarray, " N"]

MOST_ON_PROCESSORS = 4096
"""Tokens of a run where there is no accelerator: what a layer of more leaves for the next is outside the caches."""


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
    rows: Rows, lengths: Int[np.ndarray, " M"], budget: int, *, packed: bool = False,
    groups: Int[np.ndarray, " M"] | None = None,
) -> Iterator[Rows]:  # fmt: skip
    """Cut one step's rows into runs of at most `budget` tokens; a row longer than that goes alone.

    `lengths[row]` is the number of tokens of a row, prompt included. Rows that are read side by side are of similar
    length: at most `packing.MOST_PADDING` of a run's padded size is none of them. Those that are `packed` have no
    padding, and rows of one group share their prompt: a group stays together where it fits into a run.
    Longest first either way, so that a budget that does not fit into memory fails at once.
    """
    if device().type == "cpu":
        budget = min(budget, MOST_ON_PROCESSORS)
    if not packed:
        order = rows[np.argsort(-lengths[rows], kind="stable")]
        yield from (order[run] for run in packing.runs(lengths[order], budget=budget))
        return
    group = np.arange(len(rows)) if groups is None else np.unique(groups[rows], return_inverse=True)[1]
    longest = np.zeros(len(rows), dtype=np.int64)
    np.maximum.at(longest, group, lengths[rows])
    order = np.lexsort((-lengths[rows], group, -longest[group]))
    run: list[int] = []
    room = budget
    for _, members in groupby(order.tolist(), group.__getitem__):
        together = list(members)
        fits = lengths[rows[together]].sum() <= budget
        for places in [together] if fits else [[place] for place in together]:
            size = int(lengths[rows[places]].sum())
            if run and size > room:
                yield rows[run]
                run, room = [], budget
            run += places
            room -= size
    if run:
        yield rows[run]
