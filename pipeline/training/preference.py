"""Preference: all comparisons between responses to one prompt are one element of the batch.

Shapes: E elements (prompts), N rankings, K responses of the longest ranking, R responses of all elements.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline import ragged
from pipeline.algorithms.losses import pairs, ranking
from pipeline.models.device import device
from pipeline.models.distributed import together
from pipeline.models.forward import packs, response_scores
from pipeline.text import Chat
from pipeline.training import batches
from pipeline.training.batches import Rows
from pipeline.training.loop import Losses


class Ranked(NamedTuple):
    """One annotator's ranking of some of an element's responses."""

    name: str
    annotator: str | None
    places: list[int]
    """Which of the element's responses."""
    ranks: list[int]
    """0 is best; equal ranks are ties."""
    ratings: list[float] | None


@dataclass(frozen=True)
class Element:
    """A prompt, the different responses to it, and every ranking of them."""

    prompt_id: str
    prompt: list[int]
    responses: list[list[int]] = field(default_factory=list)
    rankings: list[Ranked] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Padded tokens of a row per response: the most that a forward pass reads, where nothing is packed."""
        return len(self.responses) * (len(self.prompt) + max(map(len, self.responses)))

    def only(self, rankings: Iterable[Ranked]) -> "Element":
        """The prompt with these of its rankings, and the responses that they are about."""
        kept = list(rankings)
        used = sorted({place for one in kept for place in one.places})
        new = {place: number for number, place in enumerate(used)}
        moved = [one._replace(places=[new[place] for place in one.places]) for one in kept]
        return Element(self.prompt_id, self.prompt, [self.responses[place] for place in used], moved)


def elements(rankings: Iterable[Mapping[str, Any]], chat: Chat) -> list[Element]:
    """Rows of the rankings contract by prompt, in the order in which prompts first occur; tokenized once.

    Second draws of a prompt (`#1`) belong to it. A ranking that comes again counts once, unless it says something else:
    whoever is asked twice may change their mind.
    """
    made: dict[str, Element] = {}
    places: dict[str, dict[str, int]] = {}
    seen: set[tuple[str, frozenset[tuple[str, int]]]] = set()
    for row in rankings:
        said = (row["ranking_id"], frozenset(zip(row["responses"], row["ranks"], strict=True)))
        if said in seen:
            continue
        seen.add(said)
        prompt_id = row["prompt_id"].partition("#")[0]
        if prompt_id not in made:
            made[prompt_id] = Element(prompt_id, chat.prompt_tokens(row["messages"]))
            places[prompt_id] = {}
        element, known = made[prompt_id], places[prompt_id]
        for text in row["responses"]:
            if text not in known:
                known[text] = len(known)
                element.responses.append(chat.response_tokens(text))
        element.rankings.append(
            Ranked(
                row["ranking_id"], row["annotator"], [known[text] for text in row["responses"]], row["ranks"],
                row.get("ratings"),
            )
        )  # fmt: skip
    return list(made.values())


@dataclass(frozen=True)
class Compared:
    """The rankings of some elements as arrays."""

    owner: Int[np.ndarray, " N"]
    """Which element each ranking belongs to."""
    places: Int[Tensor, "N K"]
    """Which of all the elements' responses; 0 where there is none."""
    ranks: Int[Tensor, "N K"]
    mask: Bool[Tensor, "N K"]
    """True where there is a response."""
    rating_gaps: Float[Tensor, "N K K"]
    """Rating of the first less that of the second; NaN where there are no ratings."""

    @classmethod
    def of(cls, some: Sequence[Element]) -> "Compared":
        """Pad the rankings to the longest of them."""
        ranked = [one for element in some for one in element.rankings]
        owner = np.repeat(np.arange(len(some)), [len(element.rankings) for element in some])
        starts = np.cumsum([0, *(len(element.responses) for element in some)])[owner]
        counts = np.array([len(one.ranks) for one in ranked], dtype=np.int64)
        mask = torch.from_numpy(ragged.mask_of(counts))

        def padded(rows: Iterable[Iterable[float]], dtype: torch.dtype) -> Tensor:
            flat = torch.tensor([value for row in rows for value in row], dtype=dtype)
            return torch.zeros(mask.shape, dtype=dtype).masked_scatter(mask, flat)

        places = padded(
            ([start + place for place in one.places] for start, one in zip(starts, ranked, strict=True)), torch.long
        )
        ratings = padded((one.ratings or [float("nan")] * len(one.ranks) for one in ranked), torch.float64)
        gaps = ratings[:, :, None] - ratings[:, None, :]
        return cls(owner, places, padded((one.ranks for one in ranked), torch.long), mask, gaps)

    @property
    def pairs(self) -> Bool[Tensor, "N K K"]:
        """Which responses are compared."""
        return pairs(self.ranks, self.mask)

    @property
    def counts(self) -> Int[np.ndarray, " E"]:
        """Pairs of each element."""
        of_rankings = self.pairs.sum(dim=(1, 2)).numpy()
        return np.bincount(self.owner, weights=of_rankings).astype(np.int64)

    @property
    def weights(self) -> Float[Tensor, " N"]:
        """Share of each ranking's pairs among those of its element: they add up to 1 in each."""
        return self.pairs.sum(dim=(1, 2)).double() / torch.from_numpy(self.counts[self.owner])

    def margins(self, factor: float) -> Float[Tensor, "N K K"] | None:
        """By how much the better response must lead; None where nothing is asked for."""
        return factor * torch.nan_to_num(self.rating_gaps) if factor else None


def accuracies(
    scores: Float[Tensor, "N K"], ranks: Int[Tensor, "N K"], mask: Bool[Tensor, "N K"]
) -> Float[Tensor, " N"]:
    """Share of each ranking's pairs whose better response has the higher score; equal scores are half right."""
    chosen = pairs(ranks, mask)
    lead = (scores[:, :, None] - scores[:, None, :]).sign()
    return torch.where(chosen, (lead + 1) / 2, 0).sum(dim=(1, 2)) / chosen.sum(dim=(1, 2)).clamp(min=1)


@dataclass(frozen=True)
class Preference:
    """The objective: the mean over an optimizer step's prompts of the loss over all pairs of each.

    Every response is read once, whatever the number of pairs it is in (arXiv:2203.02155, section 3.5).
    """

    elements: Sequence[Element]
    """Each has a pair."""
    margin: float = 0.0
    """The better response must lead by this times the difference of the ratings."""
    groups: ClassVar[None] = None
    """An element has all responses to its prompt."""

    @cached_property
    def lengths(self) -> Int[np.ndarray, " E"]:
        """Tokens per element."""
        return np.array([element.tokens for element in self.elements], dtype=np.int64)

    def passes(self, rows: Rows) -> Sequence[Rows]:
        """All rows are of one kind."""
        return [rows]

    def step(self, rows: Rows) -> int:
        """The number of prompts in the step."""
        return len(rows)

    def losses(self, model: nn.Module, rows: Rows, step: int) -> Losses:
        """Its share of the mean over the step."""
        chosen = [self.elements[row] for row in rows]
        compared, place = Compared.of(chosen), device()
        scores = element_scores(model, chosen)[compared.places.to(place)]
        ranks, mask, weights = (tensor.to(place) for tensor in (compared.ranks, compared.mask, compared.weights))
        margins = compared.margins(self.margin)
        margins = None if margins is None else margins.to(place, scores.dtype)
        losses = ranking(scores, ranks, mask, margins=margins) * weights.to(scores.dtype) / step
        total = losses.sum()
        right = (accuracies(scores.detach(), ranks, mask) * weights).sum() / step
        return Losses(total, {"loss/ranking": float(total.detach()), "accuracy/pairs": float(right)})

    def names(self, rows: Rows) -> list[str]:
        """Prompts by their id."""
        return [f"prompt {self.elements[row].prompt_id}" for row in rows]


def element_scores(model: nn.Module, some: Sequence[Element]) -> Float[Tensor, " R"]:
    """Scores of all responses, one element after the other."""
    prompts = [element.prompt for element in some for _ in element.responses]
    return response_scores(model, prompts, [response for element in some for response in element.responses])


def scored(model: nn.Module, some: Sequence[Element], budget: int) -> Float[np.ndarray, " R"]:
    """The same without gradients, `budget` tokens at a time."""
    found: dict[int, np.ndarray] = {}
    lengths = np.array([element.tokens for element in some], dtype=np.int64)
    pieces = list(batches.micro_batches(np.arange(len(some)), lengths, budget, packed=packs(model)))
    for rows, scores in together(pieces, lambda rows: _read(model, [some[row] for row in rows]), model):
        ends = np.cumsum([len(some[row].responses) for row in rows])[:-1]
        found |= zip(rows.tolist(), np.split(scores, ends), strict=True)
    return np.concatenate([found[row] for row in range(len(some))])


@torch.no_grad()
def _read(model: nn.Module, some: Sequence[Element]) -> Float[np.ndarray, " R"]:
    scores: Float[np.ndarray, " R"] = element_scores(model, some).double().cpu().numpy()
    return scores
