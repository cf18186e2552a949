"""Few rows at a time: what is made on the way then stays in the processor's cache. No result depends on it."""

from collections.abc import Iterator

ELEMENTS = 1 << 18
"""Of a lot, where a row has no more: 2 MiB of float64."""


def lots(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices that cover all rows of an array [B, T]."""
    rows, width = shape
    step = max(1, ELEMENTS // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))
