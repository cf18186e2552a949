"""Imitation: next-token likelihood of some tokens of a text, be it a demonstration or a document."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from pipeline.algorithms.losses import nll
from pipeline.errors import ContractError
from pipeline.models.forward import response_logprobs
from pipeline.text import Chat
from pipeline.training.batches import Rows
from pipeline.training.loop import Losses


class Example(NamedTuple):
    """A text, and which of its tokens are imitated."""

    name: str
    """What to call it in an error."""
    prompt: list[int]
    """Tokens before the first target; at least one."""
    targets: list[int]
    """All tokens after the prompt."""
    mask: list[bool]
    """True on the targets that are imitated."""


@dataclass(frozen=True)
class Imitation:
    """The objective: mean negative log-likelihood over the imitated tokens of an optimizer step.

    L = -1/N sum_t log pi(y_t | y_<t)              N: imitated tokens of the whole step, at temperature 1
    """

    examples: Sequence[Example]
    groups: ClassVar[None] = None

    @cached_property
    def lengths(self) -> Int[np.ndarray, " M"]:
        """Tokens per example."""
        return np.array([len(e.prompt) + len(e.targets) for e in self.examples], dtype=np.int64)

    def passes(self, rows: Rows) -> Sequence[Rows]:
        """All rows are of one kind."""
        return [rows]

    def step(self, rows: Rows) -> int:
        """The number of imitated tokens in the step."""
        return sum(sum(self.examples[row].mask) for row in rows)

    def losses(self, model: nn.Module, rows: Rows, step: int) -> Losses:
        """Its share of the token mean over the step."""
        chosen = [self.examples[row] for row in rows]
        out = response_logprobs(model, [e.prompt for e in chosen], [e.targets for e in chosen])
        mask = torch.zeros_like(out.mask)
        for index, example in enumerate(chosen):
            mask[index, : len(example.mask)] = torch.tensor(example.mask, device=mask.device)
        total = (mask / step * nll(out.logprobs)).sum()
        return Losses(total, {"loss/nll": float(total.detach())})

    def names(self, rows: Rows) -> list[str]:
        """Examples by their name."""
        return [self.examples[row].name for row in rows]


def windows(documents: Iterable[Mapping[str, Any]], chat: Chat, limit: int) -> list[Example]:
    """Rows of documents as examples of at most `limit` tokens; all tokens but the first of each are imitated.

    Raises `ContractError` when none has two tokens.
    """
    found = [
        Example(f"document {document['document_id']}", tokens[:1], tokens[1:], [True] * (len(tokens) - 1))
        for document in documents
        for tokens in chat.document_tokens(document["text"], limit)
    ]
    if not found:
        raise ContractError(
            f"no document has two tokens, cut to {limit}", do="name longer ones as data.documents; raise the limit"
        )
    return found
