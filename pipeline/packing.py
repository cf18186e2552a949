"""How texts are laid out for a model: as a tree, what some of them begin with once for all of them; or in padded rows.

A token depends on what is before it alone. So it is read once for all texts that are the same up to it: a prompt for
all of its responses, and the beginning of responses that part later. Next to no padding is computed. Only attention
needs rows then: there each text is whole, beside others of about its length.

Sizes are rounded up, so that they come again: what stands behind the real tokens counts for nothing.

Shapes: B responses, each behind its prompt a text; N nodes of the tree, a token each; U of them in responses; L tokens
of the longest text, T of the longest response, M places of all rows, D numbers of a token.
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
    targets: Int[Tensor, " U"]
    """Tokens of responses, those that texts have in common once; behind them there may be some that do not count."""
    mask: Bool[Tensor, "B T"]
    """True where a response has a token."""
    before: Taken
    """U of all tokens: that before each of the targets."""
    last: Taken
    """B of all tokens: the last of each response, or of its prompt where it has none."""

    def in_rows(self, numbers: Float[Tensor, " U"]) -> Float[Tensor, "B T"]:
        """What was found for the targets as a row per response; 0 where it has no token."""
        ...


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

    def in_rows(self, numbers: Float[Tensor, " U"]) -> Float[Tensor, "B T"]:
        """The numbers of each response."""
        return _scattered(numbers, self.mask)


class Packed:
    """One row of all nodes of the tree of some texts; at its end less than a sixteenth is padding.

    Tokens must see one another by attention alone, and by that of `pipeline/attention.py`, to which a model hands this.
    """

    def __init__(self, prompts: Texts, responses: Texts, device: torch.device) -> None:
        asked, counts = _sizes(prompts), _sizes(responses)
        lengths = asked + counts
        tree = Tree([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)])
        total = rounded(len(tree.tokens))
        self.tokens, self.positions = (
            torch.from_numpy(_filled_up(of, total))[None].to(device) for of in (tree.tokens, tree.positions)
        )
        said, in_rows = np.unique(tree.nodes[_mask(lengths) & ~_mask(asked, tree.nodes.shape[1])], return_inverse=True)
        count, last = rounded(len(said)), tree.nodes[np.arange(len(lengths)), lengths - 1]
        self.targets, self.mask = (
            torch.from_numpy(of).to(device) for of in (_filled_up(tree.tokens[said], count), _mask(counts))
        )
        self.before = Taken(_filled_up(tree.parents[said], count), total, device)
        self.last = Taken(last, total, device)
        self._said = Taken(in_rows, count, device)
        self.attended = 0
        """Layers that have asked for their attention so far."""

        # Texts that others begin with, or are, have no row of their own.
        rows = np.unique(last, return_index=True)[1]
        rows = rows[~np.isin(last[rows], tree.parents)]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        self._blocks: list[tuple[int, int]] = []
        places, homes, end = [], np.zeros(total, dtype=np.int64), 0
        for run in runs(lengths[rows]):
            block = rows[run]
            longest = rounded(int(lengths[block[0]]), least=8)
            # Behind its end a row repeats its last token: what spoils a response is not to spoil its neighbours.
            place = tree.nodes[block[:, None], np.minimum(np.arange(longest), lengths[block, None] - 1)]
            inside = np.arange(longest) < lengths[block, None]
            homes[place[inside]] = end + inside.ravel().nonzero()[0]
            places.append(place.ravel())
            self._blocks.append((len(block), longest))
            end += inside.size
        self._rows, self._home = Taken(np.concatenate(places), total, device), Taken(homes, end, device)

    def in_rows(self, numbers: Float[Tensor, " U"]) -> Float[Tensor, "B T"]:
        """The numbers of each response; several may have those of one node."""
        return _scattered(self._said(numbers[:, None])[:, 0], self.mask)

    def apart(self, states: Float[Tensor, "N D"]) -> list[Float[Tensor, "rows longest D"]]:
        """Rows: each text that no other begins with, beside those of about its length; padded on the right."""
        parts = torch.split(self._rows(states), [rows * longest for rows, longest in self._blocks])
        return [part.view(*block, -1) for part, block in zip(parts, self._blocks, strict=True)]

    def together(self, rows: Sequence[Float[Tensor, "rows longest D"]]) -> Float[Tensor, "N D"]:
        """The inverse: what was found for each node in one of the rows that have it."""
        return self._home(torch.cat([states.flatten(0, 1) for states in rows]))


class Tree:
    """All beginnings of some texts, each once: a node is the last token of one, and its parent that before it."""

    tokens: Int[np.ndarray, " N"]
    positions: Int[np.ndarray, " N"]
    parents: Int[np.ndarray, " N"]
    """-1 where a text begins."""
    nodes: Int[np.ndarray, "B L"]
    """Of each text's tokens; any number behind its end."""

    def __init__(self, texts: Sequence[list[int]]) -> None:
        # In their order a text has most in common with the one before it.
        order = sorted(range(len(texts)), key=texts.__getitem__)
        there = _mask(_sizes([texts[row] for row in order]))
        tokens = np.full(there.shape, -1, dtype=np.int64)
        tokens[there] = _flat(texts[row] for row in order)
        new = there.copy()
        new[1:] &= ~np.logical_and.accumulate(tokens[1:] == tokens[:-1], axis=1)
        numbers = np.cumsum(new).reshape(new.shape) - 1
        met = np.maximum.accumulate(np.where(new, np.arange(len(order))[:, None], 0), axis=0)
        self.nodes = np.empty_like(numbers)
        self.nodes[order] = sorted_nodes = np.take_along_axis(numbers, met, axis=0)
        self.tokens, self.positions = tokens[new], new.nonzero()[1]
        before = np.concatenate([np.full((len(order), 1), -1), sorted_nodes[:, :-1]], axis=1)
        self.parents = before[new]


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


def _mask(lengths: Sizes, width: int | None = None) -> Bool[np.ndarray, "B L"]:
    """True where a row of that length has a token; as wide as the longest, unless told otherwise."""
    return np.arange(int(lengths.max()) if width is None else width) < lengths[:, None]


def _filled_up(numbers: Int[np.ndarray, " N"], count: int) -> Int[np.ndarray, " count"]:
    """So many numbers, with zeros behind those that are there."""
    return np.pad(numbers, (0, count - len(numbers)))


def _scattered(numbers: Float[Tensor, " R"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Numbers of the responses' tokens as rows; what is behind the last token is left out."""
    return numbers.new_zeros(mask.shape).masked_scatter(mask, numbers)
