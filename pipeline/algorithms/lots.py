"""Few rows at a time, on every core: what is made on the way stays in its cache. No result depends on it."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Float64

ELEMENTS = 1 << 18
"""Of a lot, where a row has no more: 2 MiB of float64."""


def lots(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices that cover all rows of an array [B, T]."""
    rows, width = shape
    step = max(1, ELEMENTS // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def each_lot(shape: tuple[int, ...], work: Callable[[slice], None]) -> None:
    """Have `work` fill the rows of every lot of arrays [B, T], in any order; it writes to no others."""
    first, *others = lots(shape) if shape[0] else [slice(0)]
    if others:
        list(_cores().map(work, [first, *others]))
    else:
        work(first)


@cache
def _cores() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lots")


def row_sums(column: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]) -> Float64[np.ndarray, " B"]:
    """Of each row, over the tokens that the mask holds."""
    found = np.zeros(len(mask))

    def fill(lot: slice) -> None:
        found[lot] = np.where(mask[lot], column[lot], column.dtype.type(0)).sum(axis=1, dtype=np.float64)

    each_lot(mask.shape, fill)
    return found
