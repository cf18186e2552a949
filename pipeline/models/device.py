"""Where tensors live."""

import gc
from functools import cache

import torch

from pipeline import heaps

heaps.share()


@cache
def device() -> torch.device:
    """The accelerator of this process if it has one, the processor otherwise."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def give_back() -> None:
    """Let other processes have the accelerator's memory that no tensor of this one needs any more; torch would keep it.

    Models hang together in circles, so that theirs is free only once those are found.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
