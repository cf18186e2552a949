"""One model on several processes: FSDP2 under torchrun, for the stages that train or read with a model.

Every process (rank) runs the same stage on the same inputs; rank 0 alone writes. Weights, gradients and moments are
sharded (Zhao et al., arXiv:2304.11277). The micro-batches of an optimizer step are dealt to the ranks and the
gradients *summed*: a token's weight is of the whole step already, so that the number of ranks changes no result
beyond rounding. With one process nothing here does anything.

A rank that has no micro-batch left reads one again and counts it for nothing: gathering the weights takes all.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.errors import ExperimentError
from pipeline.models.abreast import abreast, lanes, settle
from pipeline.models.device import device
from pipeline.ranks import count, rank

Piece = TypeVar("Piece")
Found = TypeVar("Found")


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that torchrun started. Raises `ExperimentError` where this machine has no GPU for each."""
    if count() == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device().type == "cuda":
        torch.cuda.set_device(card_of(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
        backend = "cpu:gloo,cuda:nccl"  # objects travel by gloo, tensors of a GPU by NCCL
    dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _mesh.cache_clear()


def card_of(number: int, cards: int) -> int:
    """The GPU, of so many in this machine, that its process of that number computes on: bare `cuda` means it there."""
    if number >= cards:
        raise ExperimentError(
            f"torchrun started a process number {number} here, counted from 0, and this machine has {cards} GPUs",
            "resources.torchrun", f"--nproc-per-node={cards}, or auto",
        )  # fmt: skip
    return number


@cache
def _mesh(kind: str) -> DeviceMesh:
    return init_device_mesh(kind, (count(),))


def told(word: Found | None) -> Found | None:
    """What rank 0 says, on every rank."""
    if count() == 1:
        return word
    said = [word]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def everybody(word: Found) -> list[Found]:
    """What every rank says, in their order, on every rank."""
    if count() == 1:
        return [word]
    said: list[Any] = [None] * count()
    dist.all_gather_object(said, word)
    return said


def shard(model: Any) -> Any:
    """Put a model on this process's device, and its weights on all ranks: a group per layer, the rest together.

    A device never holds more than its share and one group: `fully_shard` moves a group, buffers included, as it shards.
    """
    settle(model)
    if count() == 1:
        return model if model.device == device() else model.to(device())
    mesh = _mesh(device().type)
    whole_layers = set(model._no_split_modules or ())  # transformers has no public name for them
    for module in model.modules():
        if type(module).__name__ in whole_layers:
            fully_shard(module, mesh=mesh)
    # What the last pass gathered of the rest stays until it is released: the head is called after the pass.
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.as_forward = MethodType(lambda self, function, **given: function(self, **given), model)
    register_fsdp_forward_method(model, "as_forward")
    return model


def called(model: Any, function: Callable[..., Tensor], **given: Any) -> Tensor:
    """`function(model, **given)`, which is the model's forward pass or the largest part of it."""
    forward = getattr(model, "as_forward", None)  # what `shard` has given it
    return function(model, **given) if forward is None else forward(function, **given)


def released(model: nn.Module) -> nn.Module:
    """The model, nothing of it gathered: its parameters are what is trained, and the next pass reads them anew."""
    if isinstance(model, FSDPModule):
        model.reshard()
    return model


def own(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(found: Tensor, of: Tensor) -> Tensor:
    """`found`, all of a tensor or this rank's share of it, laid out as `of`. Raises `ValueError` for other shapes."""
    if found.shape not in (of.shape, own(of).shape):
        raise ValueError(f"of shape {list(found.shape)}, the model's is {list(of.shape)}")
    if not isinstance(of, DTensor):
        return found
    if found.shape == of.shape:
        return distribute_tensor(found.to(of.device), of.device_mesh, of.placements, src_data_rank=None)
    return DTensor.from_local(
        found.to(of.device), of.device_mesh, of.placements, shape=of.shape, stride=of.stride(), run_check=False
    )


def on_host(tensor: Tensor) -> Tensor:
    """Room in the host's memory for a tensor, or for this rank's share of it, laid out as that is."""
    room = torch.empty_like(own(tensor.detach()), device="cpu")
    if not isinstance(tensor, DTensor):
        return room
    return DTensor.from_local(
        room, _mesh("cpu"), tensor.placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of each tensor on the CPU of rank 0, one after the other; on other ranks nothing stays."""
    found = {}
    for name, tensor in tensors.items():
        all_of_it = whole(tensor.detach())
        if rank() == 0:
            found[name] = all_of_it.cpu()
    return found


def dealt(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, bool]]:
    """This rank's share of what all have to do, and whether it counts: all ranks get as many, some again."""
    for first in range(0, len(pieces), count()):
        place = first + rank()
        yield pieces[min(place, len(pieces) - 1)], place < len(pieces)


def together(
    pieces: Sequence[Piece], work: Callable[[Piece], Found], model: nn.Module
) -> Iterator[tuple[Piece, Found]]:
    """Every piece with what `work` makes of it by `model`, in their order: each rank does its share, and all get all.

    A single process works on as many at once as is worth while: what torch keeps for each thread, such as
    `torch.no_grad`, `work` sets for itself.
    """
    if count() == 1:
        yield from zip(pieces, abreast(work, pieces, lanes(model)), strict=True)
        return
    for number, (piece, _) in enumerate(dealt(pieces)):
        yield from zip(pieces[number * count() :], everybody(work(piece)), strict=False)


def added(numbers: Mapping[str, float], largest: frozenset[str]) -> dict[str, float]:
    """Sum over ranks of each number, which not every rank has; of those in `largest` the largest."""
    total: dict[str, float] = {}
    for share in everybody(dict(numbers)):
        for name, value in share.items():
            total[name] = max(total.get(name, value), value) if name in largest else total.get(name, 0.0) + value
    return total
