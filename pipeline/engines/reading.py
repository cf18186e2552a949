"""Texts that a Hugging Face model reads together, one more token of each at a time.

What texts begin with in common is read once, until they part. Left to itself, transformers copies all that was read for
every further token, to put the token behind it. Here it is written into room that is there already, and what is copied
is a text that parts from another, to the place of one that has ended.

Shapes: N texts, R rows of the cache, T tokens of a round, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.errors import EngineError
from pipeline.finite import all_finite
from pipeline.packing import rounded
from pipeline.products import wide_products

ROOM = 1.5
"""How many times as long a text may become before what was read of it is copied to a larger place."""

LEAST_USED = 0.75
"""Share of the rows that are some text's. With fewer the others are taken out: that copies all that was read, and costs
as much as some rounds in which they are read on."""

ROWS = 64
"""Rows of wide products come in multiples of this: oneDNN compiles a kernel for each number of them."""

FEW = 128
"""Tokens of a round from which on wide products are the faster ones, with a width of 128."""


class Reader:
    """Texts that are read together, left-padded to one length; each round takes one more token of each."""

    logits: Float[Tensor, "N V"]
    """Of the token that comes next in each text."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], most: int, device: torch.device) -> None:
        """Read the prompts, of which there will be `most` texts at once."""
        self.model = model
        width = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        self.attended = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            self.attended[row, width - len(prompt) :] = 1
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [Roomy(most) if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        self._roomy = all(isinstance(layer, Roomy) for layer in self.cache.layers)
        self._rows = np.arange(len(prompts))
        """Where each text stands; other rows are nobody's."""
        self._forward(tokens)

    def read(self, texts: Int[np.ndarray, " N"], tokens: Int[Tensor, " N"]) -> None:
        """Go on with `texts`, each with its token: those left out have ended, one named several times parts here."""
        self._place(texts)
        following = self.attended.new_zeros(len(self.attended), 1)
        following[self._rows, 0] = tokens
        self.attended = torch.cat([self.attended, torch.ones_like(following)], dim=1)
        self._forward(following)

    def _place(self, texts: Int[np.ndarray, " N"]) -> None:
        """Have each text stand in a row of its own that holds what was read of it."""
        held, there = self._rows[texts], len(self.attended)
        room = _room(len(texts)) if self._roomy else len(texts)
        if not self._roomy or room <= LEAST_USED * there:
            self._rows = np.arange(len(texts))
            self._select(np.concatenate([held, held[:1].repeat(room - len(texts))]))
            return
        room = max(room, there)
        parting = np.delete(np.arange(len(texts)), np.unique(held, return_index=True)[1])
        free = np.setdiff1d(np.arange(room), held)
        self._rows = held.copy()
        self._rows[parting], unused = np.split(free, [len(parting)])
        unused = unused[unused >= there]  # nobody's yet: something finite is to stand there
        self._copy(np.concatenate([held[parting], held[:1].repeat(len(unused))]),
                   np.concatenate([self._rows[parting], unused]), room)  # fmt: skip

    def _select(self, rows: Int[np.ndarray, " R"]) -> None:
        """Go on with these rows alone."""
        self.attended = self.attended[rows]
        self.cache.batch_select_indices(torch.from_numpy(rows).to(self.attended.device))

    def _copy(self, sources: Int[np.ndarray, " N"], targets: Int[np.ndarray, " N"], room: int) -> None:
        """Have rows `targets` hold what `sources` do; of `room` rows, where there may have been fewer."""
        if not len(targets):
            return
        more = room - len(self.attended)
        self.attended = torch.cat([self.attended, self.attended.new_zeros(more, self.attended.shape[1])])
        at, to = (torch.from_numpy(of).to(self.attended.device) for of in (sources, targets))
        self.attended[to] = self.attended[at]
        for layer in self.cache.layers:
            layer.copy(at, to, room)

    @torch.inference_mode()
    def _forward(self, tokens: Int[Tensor, "R T"]) -> None:
        positions = (self.attended.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with wide_products() if tokens.numel() >= FEW else nullcontext():
            output = self.model(
                input_ids=tokens,
                attention_mask=self.attended,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.logits = output.logits[:, -1].float()[self._rows]
        if not all_finite(self.logits):
            raise EngineError("the model's logits are not finite", do="check the checkpoint's tensors")


def _room(texts: int) -> int:
    """Rows for so many."""
    return texts if texts < FEW else rounded(texts, least=ROWS)


class Roomy(DynamicLayer):  # type: ignore[misc]  # transformers has no stubs
    """Keys and values of a layer, [R, heads, tokens, width], in a place with room for rows and tokens to come."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of further tokens behind the others and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._place = (key_states[:, :, :0], value_states[:, :, :0])
        rows, start, end = len(key_states), self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        self._see(rows, end)
        for seen, states in zip((self.keys, self.values), (key_states, value_states), strict=True):
            seen[:, :, start:] = states
        return self.keys, self.values

    def copy(self, sources: Int[Tensor, " N"], targets: Int[Tensor, " N"], rows: int) -> None:
        """Have rows `targets` hold what `sources` do; of `rows` rows, where there may have been fewer."""
        self._see(rows, self.keys.shape[-2])
        for seen in (self.keys, self.values):
            seen[targets] = seen[sources]

    def batch_select_indices(self, indices: Int[Tensor, " N"]) -> None:
        """Go on with these rows, and the room behind them."""
        keys, values = self._place
        self._place = keys.index_select(0, indices), values.index_select(0, indices)
        self._see(len(indices), self.keys.shape[-2])

    def _see(self, rows: int, length: int) -> None:
        """Have so many rows and tokens; what is not written yet may be anything."""
        room = self._place[0].shape
        if rows > room[0] or length > room[2]:
            wanted = max(rows, self.most), room[2] if length <= room[2] else int(ROOM * length) + 1
            self._place = _larger(self.keys, *wanted), _larger(self.values, *wanted)
        self.keys, self.values = (place[:rows, :, :length] for place in self._place)


def _larger(states: Float[Tensor, "R heads tokens width"], rows: int, length: int) -> Float[Tensor, "..."]:
    """A copy in a place for more."""
    here, heads, tokens, width = states.shape
    place = states.new_empty(rows, heads, length, width)
    place[:here, :, :tokens] = states
    return place
