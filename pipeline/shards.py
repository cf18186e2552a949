"""The parts of a dataset that a stage makes, where they need nothing of each other: done here, or by a crew elsewhere.

    work = Sampler(...)                            what to do, and what that needs: all of it can be pickled
    for made in spread(work, parts, cut): ...      what comes of each part, in their order, whoever did it

Here a part is one shard; elsewhere it is cut into several, so that all workers have something to do.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

Shard = TypeVar("Shard")
Shard_contra = TypeVar("Shard_contra", contravariant=True)
Made = TypeVar("Made")
Made_co = TypeVar("Made_co", covariant=True)


class Work(Protocol[Shard_contra, Made_co]):
    """What a stage does with each shard. Whoever does several keeps what is loaded from one to the next."""

    def __call__(self, shard: Shard_contra, /) -> Made_co:
        """Do one shard."""
        ...

    def rest(self) -> None:
        """Let go of what was loaded, until the next shard."""
        ...


class Crew(Protocol):
    """Workers that do shards elsewhere."""

    processors: int
    """That each of them may use."""

    def __call__(self, work: Work[Any, Any], shards: Iterable[Any], reads: Sequence[Path]) -> Iterator[Any]:
        """Yield what comes of the shards, in their order; `reads` are the artifacts that the work opens by path."""
        ...


_crew: ContextVar[Crew | None] = ContextVar("crew", default=None)


@contextmanager
def done_by(crew: Crew) -> Iterator[None]:
    """Have `spread` hand shards to a crew."""
    before = _crew.set(crew)
    try:
        yield
    finally:
        _crew.reset(before)


def elsewhere() -> bool:
    """Whether shards are done in other processes, perhaps on other machines."""
    return _crew.get() is not None


def processors() -> int:
    """How many whoever does a shard may use."""
    crew = _crew.get()
    return (os.cpu_count() or 1) if crew is None else crew.processors


def spread(
    work: Work[Shard, Made], parts: Iterable[Shard], cut: Callable[[Shard], Sequence[Shard]], reads: Sequence[Path] = ()
) -> Iterator[list[Made]]:
    """What `work` makes of the shards of each part; `reads` are the artifacts that it opens by path."""
    crew = _crew.get()
    if crew is None:
        try:
            for part in parts:
                yield [work(part)]
        finally:
            work.rest()
        return
    counts: deque[int] = deque()

    def shards() -> Iterator[Shard]:
        for part in parts:
            pieces = cut(part)
            counts.append(len(pieces))
            yield from pieces

    made = crew(work, shards(), reads)
    for first in made:
        yield [first, *islice(made, counts.popleft() - 1)]
