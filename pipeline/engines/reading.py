"""Texts that a Hugging Face model reads together, one more token of each at a time.

Left to itself, transformers copies all that was read for every further token, to put the token behind it. Here it is
written into room that is there already.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.errors import EngineError
from pipeline.finite import all_finite
from pipeline.products import wide_products

ROOM = 1.5
"""How many times as long a text may become before what was read of it is copied to a larger place."""

FEW = 128
"""Tokens of a round from which on wide products are the faster ones, with a width of 128."""


class Reader:
    """Texts that are read together, left-padded to one length; each round takes one more token of each."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.model = model
        width = max(map(len, prompts))
        self.tokens = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        self.attended = torch.zeros_like(self.tokens)
        for row, prompt in enumerate(prompts):
            self.tokens[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            self.attended[row, width - len(prompt) :] = 1
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        self.logits = self._forward()

    def read(self, tokens: Int[Tensor, " R"]) -> None:
        """Let each text go on with its token."""
        self.tokens = tokens[:, None]
        self.attended = torch.cat([self.attended, torch.ones_like(self.tokens)], dim=1)
        self.logits = self._forward()

    def select(self, rows: Int[Tensor, " N"]) -> None:
        """Go on with these texts, some of them several times: what was read of them is shared."""
        self.attended, self.logits = self.attended[rows], self.logits[rows]
        self.cache.batch_select_indices(rows)

    @torch.inference_mode()
    def _forward(self) -> Float[Tensor, "R V"]:
        positions = (self.attended.cumsum(dim=1) - 1).clamp(min=0)[:, -self.tokens.shape[1] :]
        with wide_products() if self.tokens.numel() >= FEW else nullcontext():
            output = self.model(
                input_ids=self.tokens,
                attention_mask=self.attended,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[:, -1].float()
        if not all_finite(logits):
            raise EngineError("the model's logits are not finite", do="check the checkpoint's tensors")
        return logits


class Roomy(DynamicLayer):  # type: ignore[misc]  # transformers has no stubs
    """Keys and values of a layer, [R, heads, tokens, width], in a place that has room for tokens to come."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of further tokens behind the others and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._place = (key_states[:, :, :0], value_states[:, :, :0])
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if end > self._place[0].shape[-2]:
            self._place = (_roomy(self.keys, end), _roomy(self.values, end))
        for place, states in zip(self._place, (key_states, value_states), strict=True):
            place[:, :, start:end] = states
        self.keys, self.values = (place[:, :, :end] for place in self._place)
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, " N"]) -> None:
        """Go on with these rows, and the room behind them."""
        length = self.keys.shape[-2]
        keys, values = (place.index_select(0, indices) for place in self._place)
        self._place = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]


def _roomy(states: Float[Tensor, "R heads tokens width"], length: int) -> Float[Tensor, "R heads room width"]:
    """A copy in a place for more tokens than `length`."""
    rows, heads, tokens, width = states.shape
    place = states.new_empty(rows, heads, int(ROOM * length) + 1, width)
    place[:, :, :tokens] = states
    return place
