"""Few rows at a time: what is made on the way then stays in the processor's cache. No result depends on it."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float64

ELEMENTS = 1 << 18
"""Of a lot, where a row has no more: 2 MiB of float64."""


def lots(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices that cover all rows of an array [B, T]."""
    rows, width = shape
    step = max(1, ELEMENTS // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def row_sums(column: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]) -> Float64[np.ndarray, " B"]:
    """Of each row, over the tokens that the mask holds."""
    found = np.zeros(len(mask))
    for lot in lots(mask.shape):
        found[lot] = np.where(mask[lot], column[lot], column.dtype.type(0)).sum(axis=1, dtype=np.float64)
    return found
