"""How texts are laid out for a model: behind one another, a prompt once for all of its responses; or in padded rows.

Behind one another next to no padding is computed. Only attention needs rows then: there each response stands behind its
prompt, beside others of about its length.

Sizes are rounded up, so that they come again: what stands behind the real tokens counts for nothing.

Shapes: B responses, P different prompts, N tokens of both, R tokens of responses, L tokens of the longest row, T of the
longest response, M places of all rows, D numbers of a token.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

MOST_PADDING = 0.1
"""Share of the places of rows that are side by side; how it was chosen stands in tests/benchmarks/README.md."""

Texts = Sequence[Sequence[int]]
Sizes = Int[np.ndarray, " B"]


class Taken:
    """A choice of a tensor's rows; a row may be taken several times, its gradient is then the sum of theirs."""

    def __init__(self, rows: Int[np.ndarray, " M"], count: int, device: torch.device) -> None:
        self.rows, self.count, self.device = rows, count, device
        self.index = torch.from_numpy(rows).to(device)

    def __call__(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
        """Take the rows."""
        taken: Tensor = _Take.apply(states, self)  # type: ignore[no-untyped-call]  # torch has no annotation here
        return taken

    @cached_property
    def takers(self) -> tuple[Int[Tensor, " M"], Int[Tensor, " N"]]:
        """The places that each row went to, row after row, and where those of a row begin."""
        starts = _starts(np.bincount(self.rows, minlength=self.count))[:-1]
        order = np.argsort(self.rows, kind="stable")
        return torch.from_numpy(order).to(self.device), torch.from_numpy(starts).to(self.device)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, taken: Taken) -> Tensor:
        ctx.taken = taken
        return states.index_select(0, taken.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_taken: Tensor) -> tuple[Tensor, None]:
        # What autograd has for this takes a hundred times as long on a processor.
        places, starts = ctx.taken.takers
        return embedding_bag(places, of_taken.contiguous(), starts, mode="sum"), None


class Layout(Protocol):
    """Tokens as a model is given them, and where what it says of them is found."""

    tokens: Int[Tensor, "rows columns"]
    positions: Int[Tensor, "rows columns"]
    targets: Int[Tensor, " R"]
    """The responses' tokens, one response after the other; behind them there may be some that count for nothing."""
    mask: Bool[Tensor, "B T"]
    """True where a response has a token."""
    before: Taken
    """R of all tokens: that before each of the responses'."""
    last: Taken
    """B of all tokens: the last of each response, or of its prompt where it has none."""


class Padded:
    """A row per response, behind its prompt; padded on the right."""

    def __init__(self, prompts: Texts, responses: Texts, device: torch.device) -> None:
        starts, counts = _sizes(prompts), _sizes(responses)
        real = _mask(starts + counts)
        tokens = np.zeros(real.shape, dtype=np.int64)
        tokens[real] = _flat(chain.from_iterable(zip(prompts, responses, strict=True)))
        self.tokens = torch.from_numpy(tokens).to(device)
        self.positions = torch.arange(real.shape[1], device=device)[None].expand_as(self.tokens)
        mask = _mask(counts)
        rows, offsets = mask.nonzero()
        places = rows * real.shape[1] + starts[rows] + offsets
        self.targets, self.mask = self.tokens.flatten()[places], torch.from_numpy(mask).to(device)
        ends = np.arange(len(counts)) * real.shape[1] + starts + counts
        self.before, self.last = (Taken(of - 1, real.size, device) for of in (places, ends))


class Packed:
    """One row of all prompts, each once, and behind them all responses; at its end less than a sixteenth is padding.

    Tokens must see one another by attention alone, and by that of `pipeline/attention.py`, to which a model hands this.
    """

    def __init__(self, prompts: Texts, responses: Texts, device: torch.device) -> None:
        owner = numbered(prompts)
        different = [prompts[row] for row in np.unique(owner, return_index=True)[1]]
        asked, counts = _sizes(different), _sizes(responses)
        sizes = np.concatenate([asked, counts])
        starts = _starts(sizes)
        (asked_at, said_at), ends = (starts[: len(asked)], starts[len(asked) : -1]), starts[1 : len(asked) + 1][owner]
        flat, real = _flat(chain(different, responses)), int(starts[-1])
        total = rounded(real)
        behind = np.concatenate([np.zeros_like(asked), asked[owner]])
        tokens, positions = np.zeros((2, total), dtype=np.int64)
        tokens[:real], positions[:real] = flat, np.arange(real) + np.repeat(behind - starts[:-1], sizes)
        self.tokens, self.positions = (torch.from_numpy(of)[None].to(device) for of in (tokens, positions))
        said = flat[asked.sum() :]
        targets, before = np.zeros((2, rounded(len(said))), dtype=np.int64)
        targets[: len(said)], before[: len(said)] = said, np.arange(asked.sum(), real) - 1
        before[(said_at - asked.sum())[counts > 0]] = ends[counts > 0] - 1
        self.targets, self.mask = (torch.from_numpy(of).to(device) for of in (targets, _mask(counts)))
        self.before = Taken(before, total, device)
        self.last = Taken(np.where(counts > 0, said_at + counts, ends) - 1, total, device)
        self.attended = 0
        """Layers that have asked for their attention so far."""

        lengths = asked[owner] + counts
        order = np.argsort(-lengths, kind="stable")
        self._blocks: list[tuple[int, int]] = []
        places, homes, end = [], np.zeros(total, dtype=np.int64), 0
        for run in runs(lengths[order]):
            rows = order[run]
            longest = rounded(int(lengths[rows[0]]), least=8)
            # Behind its end a row repeats its last token: what spoils a response is not to spoil its neighbours.
            column = np.minimum(np.arange(longest), lengths[rows, None] - 1)
            prompt = asked[owner[rows], None]
            place = np.where(column < prompt, asked_at[owner[rows], None], said_at[rows, None] - prompt) + column
            inside = np.arange(longest) < lengths[rows, None]
            homes[place[inside]] = end + inside.ravel().nonzero()[0]
            places.append(place.ravel())
            self._blocks.append((len(rows), longest))
            end += inside.size
        self._rows, self._home = Taken(np.concatenate(places), total, device), Taken(homes, end, device)

    def apart(self, states: Float[Tensor, "N D"]) -> list[Float[Tensor, "rows longest D"]]:
        """Rows: each response behind its prompt, beside those of about its length; padded on the right."""
        parts = torch.split(self._rows(states), [rows * longest for rows, longest in self._blocks])
        return [part.view(*block, -1) for part, block in zip(parts, self._blocks, strict=True)]

    def together(self, rows: Sequence[Float[Tensor, "rows longest D"]]) -> Float[Tensor, "N D"]:
        """The inverse: what was found for each token, of a prompt what was found before one of its responses."""
        return self._home(torch.cat([states.flatten(0, 1) for states in rows]))


def numbered(texts: Texts) -> Int[np.ndarray, " B"]:
    """The number of each text, from 0 in the order in which they first occur; equal ones have one."""
    numbers: dict[tuple[int, ...], int] = {}
    return np.array([numbers.setdefault(tuple(text), len(numbers)) for text in texts], dtype=np.int64)


def runs(lengths: Sizes, padding: float = MOST_PADDING, budget: int | None = None) -> Iterator[slice]:
    """Cut rows, longest first, into runs of which at most `padding` of the padded size is none of their tokens.

    With `budget`, the padded size of a run is at most that many tokens; a longer row goes alone.
    """
    tokens = _starts(lengths)
    start = 0
    while start < len(lengths):
        longest = max(1, int(lengths[start]))
        fitting = len(lengths) if budget is None else max(1, budget // longest)
        counts = np.arange(1, min(fitting, len(lengths) - start) + 1)
        # The share of padding only grows with the count: rows get shorter.
        dense = tokens[start + counts] - tokens[start] >= (1 - padding) * longest * counts
        taken = max(1, int(dense.sum()))
        yield slice(start, start + taken)
        start += taken


def rounded(count: int, least: int = 1) -> int:
    """At least as many, and one of sixteen numbers between a power of two and the next; a multiple of `least`.

    Memory of a size that was needed before is at hand, and so are kernels: oneDNN compiles one for each shape, and
    keeps some 400 kB of it.
    """
    step = max(least, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def _sizes(texts: Texts) -> Sizes:
    return np.array([len(text) for text in texts], dtype=np.int64)


def _starts(sizes: Sizes) -> Int[np.ndarray, " further"]:
    """Where each begins behind the others, and where the last one ends."""
    return np.concatenate([[0], sizes]).cumsum()


def _flat(texts: Iterator[Sequence[int]]) -> Int[np.ndarray, " N"]:
    return np.fromiter(chain.from_iterable(texts), dtype=np.int64)


def _mask(lengths: Sizes) -> Bool[np.ndarray, "B L"]:
    """True where a row of that length has a token."""
    return np.arange(int(lengths.max())) < lengths[:, None]
