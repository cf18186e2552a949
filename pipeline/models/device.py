"""Where tensors live."""

import ctypes
import gc
from functools import cache

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""glibc's names for what `mallopt` sets."""


@cache
def device() -> torch.device:
    """The accelerator of this process if it has one, the processor otherwise."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    _keep_freed_memory()
    return torch.device("cpu")


def give_back() -> None:
    """Let other processes have the accelerator's memory that no tensor of this one needs any more; torch would keep it.

    Models hang together in circles, so that theirs is free only once those are found.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def let_go() -> None:
    """Give the system what freed tensors have left in this process, when no more of them are to come for a while."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def _keep_freed_memory() -> None:
    """Have glibc keep what tensors free for the next ones.

    It gives tens of megabytes back to the system after every backward pass otherwise, and faults their pages in again
    for the next: 7 to 15 % of an update.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes; what is larger goes back at once
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _mallopt(name: int, value: int) -> None:
    setter = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if setter is not None:
        setter(name, value)


# Heaps for all threads together. With one for each, up to eight per processor, a run kept what any of them had freed:
# 1.34 to 1.52 GB, by chance, for 1.29 to 1.34. When threads have begun it is too late.
_mallopt(M_ARENA_MAX, 2)
