"""Where tensors live."""

import ctypes
from functools import cache

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names for what `mallopt` sets."""


@cache
def device() -> torch.device:
    """The accelerator of this process if it has one, the processor otherwise."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Have glibc keep what tensors free for the next ones.

    It gives tens of megabytes back to the system after every backward pass otherwise, and faults their pages in again
    for the next: 7 to 15 % of an update.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes; what is larger goes back at once
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
