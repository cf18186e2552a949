"""Small work at the same time: a thread for each piece, whose operations are not split any further.

The operations of a small model are too short to be split between processors: at each of them threads wait for one
another, and longer where another process computes as well. Micro-batches have nothing to wait for.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from pipeline import heaps
from pipeline.models.device import device
from pipeline.products import wide_products
from pipeline.ranks import count
from pipeline.twins import twin

Piece = TypeVar("Piece")
Found = TypeVar("Found")

MOST_LANES = 4
"""Pieces at once: Python itself goes on in one thread at a time."""

MOST_WEIGHTS = 4_000_000
"""Of a model that is small. Operations of a larger one are long enough to be split, and each piece that it is trained
on at once has a gradient of its own: 20 million weights read 1.6 times as fast on one piece at a time."""


def lanes(model: nn.Module) -> int:
    """How many pieces a model is to work on at once: one on an accelerator, under torchrun, and where it is large."""
    if device().type != "cpu" or count() > 1 or large(model):
        return 1
    return min(torch.get_num_threads(), MOST_LANES)


def settle(model: nn.Module) -> None:
    """Have memory that is freed on a processor kept for a small model, and given back by a large one."""
    if device().type == "cpu":
        (heaps.keep_nothing if large(model) else heaps.keep)()


def large(model: nn.Module) -> bool:
    """Whether it has so many weights that its operations are worth being split, and its memory is worth being saved."""
    return sum(of.numel() for of in model.parameters()) > MOST_WEIGHTS


def abreast(work: Callable[[Piece], Found], pieces: Sequence[Piece], lanes: int) -> Iterator[Found]:
    """What `work` makes of each piece, in their order; `lanes` pieces at a time.

    Threads do not have what the caller has set for its own, such as `torch.no_grad`.
    """
    if lanes == 1:
        yield from map(work, pieces)
        return
    threads = torch.get_num_threads()
    # Which kernels form products is one setting for all threads: it must not change while any of them computes.
    with wide_products(), ThreadPoolExecutor(lanes, "lane", torch.set_num_threads, (threads // lanes,)) as pool:
        try:
            yield from pool.map(work, pieces)
        finally:
            torch.set_num_threads(threads)  # what threads that start later have


def on_the_same_weights(model: Any) -> Any:
    """Another model with the weights of this one, and gradients of its own."""
    shared = {id(of): nn.Parameter(of.detach(), of.requires_grad) for of in model.parameters()}
    return twin(model, shared)


def gather_gradients(models: Sequence[nn.Module]) -> None:
    """Leave the sum of the gradients of models with the same weights to the first, and none to the others."""
    for first, *others in zip(*(model.parameters() for model in models), strict=True):
        for of in others:
            if of.grad is not None:
                first.grad = of.grad if first.grad is None else first.grad.add_(of.grad)
                of.grad = None
