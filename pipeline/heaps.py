"""What glibc does with memory that was freed; another C library does as it does."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""glibc's names for what `mallopt` sets."""


def keep() -> None:
    """Keep what tensors free for the next ones.

    glibc gives tens of megabytes back to the system after every backward pass otherwise, and faults their pages in
    again for the next: 7 to 15 % of an update.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes; what is larger goes back at once
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def keep_nothing() -> None:
    """Give back what tensors free, each at once.

    With what is kept between passes through a model of 20 million weights a process held 1.30 GB for 1.14; to fault
    the pages in again takes 4 % of such an update.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**17)
    _mallopt(M_TRIM_THRESHOLD, 2**17)


def share() -> None:
    """Have all threads take from two heaps. When threads have begun it is too late.

    With one for each, up to eight per processor, a run kept what any of them had freed: 1.34 to 1.52 GB, by chance, for
    1.29 to 1.34.
    """
    _mallopt(M_ARENA_MAX, 2)


def let_go() -> None:
    """Give the system what is free in this process, when not much more is to come for a while."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _mallopt(name: int, value: int) -> None:
    setter = getattr(ctypes.CDLL(None), "mallopt", None)
    if setter is not None:
        setter(name, value)
