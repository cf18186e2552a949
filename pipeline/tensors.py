"""What is in a checkpoint's tensor files, and how it is copied."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.errors import ArtifactError

FEW = 2**24
"""Numbers below which one thread copies them all."""


@contextmanager
def copying(shapes: Iterable[Sequence[int]]) -> Iterator[None]:
    """Have one thread copy tensors of these shapes, if they are small.

    Several wait for each other where another process computes too: 70 ms in place of 2, at times.
    """
    threads = torch.get_num_threads()
    if sum(map(math.prod, shapes)) < FEW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Tensors(ExitStack):
    """The tensors of a checkpoint by name, each read from its file when it is asked for."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self._files: dict[str, Any] = {}
        paths = sorted(checkpoint.glob("*.safetensors"))
        if not paths:
            raise ArtifactError("no *.safetensors file", where=str(checkpoint))
        for path in paths:
            file = self.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))

    def names(self) -> list[str]:
        """In the order of the files."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Numbers along each dimension."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As the file calls it."""
        return str(self._files[name].get_slice(name).get_dtype())

    def columns(self, name: str, count: int) -> Tensor:
        """The first `count` input columns of a matrix, or the whole of a vector."""
        part = self._files[name].get_slice(name)
        found: Tensor = part[:] if len(part.get_shape()) == 1 else part[:, :count]
        return found

    def whole(self, name: str) -> Tensor:
        """All of it."""
        found: Tensor = self._files[name].get_tensor(name)
        return found
