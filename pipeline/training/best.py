"""What a reward model says of ranked responses, and the weights with which it said it best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.algorithms.losses import ranking
from pipeline.metrics import Metrics
from pipeline.models.distributed import own
from pipeline.training.comparisons import Comparisons, agreement
from pipeline.training.preference import Compared, Element, scored
from pipeline.training.progress import State, Weights


@dataclass(frozen=True)
class Judged:
    """What a model says of some elements, of R responses in all."""

    loss: float
    """Mean over elements. [nat]"""
    comparisons: Comparisons
    scores: Float[np.ndarray, " R"]
    """Of all responses, one element after the other."""
    lengths: Int[np.ndarray, " R"]
    """Tokens of each response."""

    @classmethod
    def of(cls, model: nn.Module, some: Sequence[Element], budget: int, margin: float) -> Self:
        """Read every response once, `budget` tokens at a time."""
        scores = scored(model, some, budget)
        lengths = np.array([len(response) for element in some for response in element.responses])
        compared = Compared.of(some)
        table = torch.from_numpy(scores)[compared.places]
        losses = ranking(table, compared.ranks, compared.mask, margins=compared.margins(margin)) * compared.weights
        made = _comparisons(some, compared, table, torch.from_numpy(lengths)[compared.places])
        return cls(float(losses.sum() / len(some)), made, scores, lengths)

    @property
    def accuracy(self) -> float:
        """Share of all comparisons whose better response has the higher score."""
        return agreement(self.comparisons)[0]

    @property
    def error(self) -> float:
        """Standard error of the accuracy, over prompts; NaN with one."""
        return agreement(self.comparisons)[1]


def _comparisons(
    some: Sequence[Element], compared: Compared, scores: Float[Tensor, "N K"], lengths: Int[Tensor, "N K"]
) -> Comparisons:
    """Every pair of every ranking."""
    row, better, worse = compared.pairs.nonzero(as_tuple=True)

    def gap(values: Tensor, first: Tensor, second: Tensor) -> np.ndarray:
        difference: np.ndarray = (values[row, first] - values[row, second]).numpy()
        return difference

    ranked = [(element.prompt_id, one) for element in some for one in element.rankings]
    of_pairs = [ranked[number] for number in row.tolist()]
    return Comparisons(
        rankings=[one.name for _, one in of_pairs], better=better.numpy(), worse=worse.numpy(),
        prompts=[prompt_id for prompt_id, _ in of_pairs], annotators=[one.annotator or "" for _, one in of_pairs],
        lead=gap(scores, better, worse), rank_gap=gap(compared.ranks, worse, better),
        rating_gap=compared.rating_gaps[row, better, worse].numpy(), length_gap=gap(lengths, better, worse),
    )  # fmt: skip


_KNOWN = ("accuracy", "loss", "step", "stale")
"""What `Best` remembers beside the weights."""


@dataclass
class Best:
    """Looks at a model every so many optimizer steps, remembers its best weights, and says when to stop."""

    model: nn.Module
    judge: Callable[[], Judged]
    """What the model says of held-out elements."""
    every: int
    """Steps between two looks."""
    patience: int
    """Looks in a row without a better accuracy after which to stop."""
    metrics: Metrics
    accuracy: float = -1.0
    loss: float = float("inf")
    step: int = 0
    """Of the best weights: highest accuracy, then lowest loss."""
    stale: int = 0
    """Looks in a row without a better accuracy."""
    weights: dict[str, Tensor] = field(default_factory=dict)

    def after_step(self, taken: int) -> bool:
        """Whether to stop, after `taken` optimizer steps."""
        if taken % self.every == 0:
            self._look(taken)
        return self.stale >= self.patience

    def state(self) -> State:
        """The best weights so far, and what is known of them."""
        return State(self.weights, {name: getattr(self, name) for name in _KNOWN})

    def resume(self, state: State) -> None:
        """Take those for the best."""
        self.weights = {name: value.clone() for name, value in state.tensors.items()}
        for name in _KNOWN:
            setattr(self, name, state.values[name])

    def _look(self, taken: int) -> None:
        self.model.eval()
        found = self.judge()
        self.model.train()
        self.metrics.add("accuracy/held_out", found.accuracy, "fraction", taken)
        self.metrics.add("loss/held_out", found.loss, "nat", taken)
        self.stale = 0 if found.accuracy > self.accuracy else self.stale + 1
        if (found.accuracy, -found.loss) > (self.accuracy, -self.loss):
            self.accuracy, self.loss, self.step = found.accuracy, found.loss, taken
            kept = Weights(self.model).state().tensors
            self.weights = {name: own(value).detach().cpu().clone() for name, value in kept.items()}

    def restore(self, taken: int) -> None:
        """Give the model the best weights, those after the last of `taken` steps among them."""
        if taken % self.every:
            self._look(taken)
        Weights(self.model).resume(State(self.weights, {}))
        self.model.eval()
