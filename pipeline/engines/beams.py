"""Beam search, once for every engine: an engine says how likely the next tokens are, the search which texts go on.

The score of a text is the sum of its tokens' log-probabilities, at temperature 1, uncut, whatever its length: nothing
is divided by the length and nothing is added for it. In other libraries' words `length_penalty = 0`, and the search
goes on until no text that is still growing can overtake the worst of the best finished ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.engines import Completion, Sampling


@dataclass(frozen=True, slots=True)
class Beam:
    """The beginning of a response, or all of it."""

    tokens: tuple[int, ...]
    score: float
    """Sum of the log-probabilities, in nat."""


class Next(NamedTuple):
    """A token that may come next."""

    token: int
    logprob: float


class BeamSearch:
    """The search for the likeliest responses to one prompt.

        candidates = every growing text with every next token
        finished   = the best `beams` of finished and of those among the best `beams` candidates that end
        growing    = the best `beams` candidates that do not end

    A candidate ends with a stop token, or because it has `max_tokens`.
    """

    def __init__(self, prompt: int, plan: Sampling) -> None:
        if plan.beams is None:
            raise ValueError("the plan asks for no beams")
        self.prompt, self.plan, self.width = prompt, plan, plan.beams
        self.growing = [Beam((), 0.0)]
        self.finished: list[Beam] = []

    @staticmethod
    def choices(plan: Sampling) -> int:
        """How many of the likeliest next tokens of each growing text are enough for the search to be exact."""
        return (plan.beams or 0) + len(plan.stop_ids)

    def advance(self, following: Sequence[Sequence[Next]]) -> list[int]:
        """Take one step, given the likeliest next tokens of each growing text.

        Returns, for each text that grows now, the place of the text that it continues. None: the search is over.
        """
        candidates = sorted(
            (
                (Beam((*beam.tokens, choice.token), beam.score + choice.logprob), parent)
                for parent, (beam, choices) in enumerate(zip(self.growing, following, strict=True))
                for choice in choices
            ),
            key=lambda candidate: -candidate[0].score,
        )
        ended = [beam for beam, _ in candidates[: self.width] if self._ends(beam)]
        self.finished = sorted([*self.finished, *ended], key=lambda beam: -beam.score)[: self.width]
        going = [candidate for candidate in candidates if not self._ends(candidate[0])][: self.width]
        if going and len(self.finished) == self.width and going[0][0].score <= self.finished[-1].score:
            going = []
        self.growing = [beam for beam, _ in going]
        return [parent for _, parent in going]

    def completions(self, seed: int) -> Iterator[Completion]:
        """The group: the best finished responses, the likeliest as sample 0.

        They are no draws from a distribution, so they have no log-probabilities; all of them carry the prompt's seed.
        """
        for sample, beam in enumerate(self.finished[: self.plan.group_size]):
            finish: Literal["stop", "length"] = "stop" if self._stops(beam) else "length"
            yield Completion(self.prompt, sample, list(beam.tokens), None, finish, seed)

    def _stops(self, beam: Beam) -> bool:
        return beam.tokens[-1] in self.plan.stop_ids

    def _ends(self, beam: Beam) -> bool:
        return self._stops(beam) or len(beam.tokens) == self.plan.max_tokens
