"""The only training loop: `fit` steps an optimizer over rows under an objective, and says what happened.

An objective weighs the tokens of a whole optimizer step before the step is cut into micro-batches; the loss is the
sum of weight times token loss. So neither the cut nor padding can change the gradient (house rule of `weights.py`).
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.errors import NumericsError
from pipeline.finite import all_finite
from pipeline.metrics import Metrics, console
from pipeline.models.abreast import abreast, gather_gradients, lanes, on_the_same_weights
from pipeline.models.distributed import added, dealt, own, released, whole
from pipeline.models.forward import packs
from pipeline.products import wide_products
from pipeline.ranks import count
from pipeline.seeds import derive
from pipeline.training import batches
from pipeline.training.batches import Rows
from pipeline.training.optimizer import Moments, Schedule
from pipeline.training.progress import Progress, Stateful, Weights


@dataclass(frozen=True)
class Losses:
    """What an objective says of one micro-batch."""

    total: Float[Tensor, ""]
    """Its share of the step's loss: sum of weight times token loss, already weighted for the whole step."""
    parts: Mapping[str, float]
    """Its share of each number worth logging; the shares of a step add up to the number."""
    largest: Mapping[str, float] = field(default_factory=dict)
    """Numbers worth logging of which a step's is the largest of its micro-batches'."""


class Objective(Protocol):
    """What a training stage wants: rows with lengths, and a loss for some of them."""

    @property
    def lengths(self) -> Int[np.ndarray, " M"]:
        """Tokens per row, prompt included."""
        ...

    @property
    def groups(self) -> Int[np.ndarray, " M"] | None:
        """Rows of one number have one prompt; None where no two have."""
        ...

    def passes(self, rows: Rows) -> Sequence[Rows]:
        """A step's rows by kind: those of two kinds are not in one micro-batch, which is one pass through the model."""
        ...

    def step(self, rows: Rows) -> Any:
        """Everything that needs the whole optimizer step's rows: the weights of their tokens."""
        ...

    def losses(self, model: nn.Module, rows: Rows, step: Any) -> Losses:
        """The loss of a micro-batch of that step."""
        ...

    def names(self, rows: Rows) -> list[str]:
        """What to call rows in an error."""
        ...


class Watcher(Stateful, Protocol):
    """Whoever looks at the model while it is trained."""

    def after_step(self, taken: int) -> bool:
        """Whether to end the training, after `taken` optimizer steps in all."""
        ...


@dataclass(frozen=True)
class Plan:
    """How to walk over the rows."""

    steps: Sequence[Rows]
    """The rows of each optimizer step, as `batches.dealt` gives them."""
    micro_batch_tokens: int
    """Padded tokens that fit into memory at once."""
    gradient_clip: float
    """Longest gradient; a longer one is scaled down to it."""
    first_step: int = 0
    """Steps taken before, by earlier iterations: the schedule goes on from there."""
    seed: int = 0
    """Of what is random in a step, where the model has dropout: a function of it and of the steps taken before."""


def fit(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    plan: Plan,
    metrics: Metrics,
    watcher: Watcher | None = None,
    progress: Progress | None = None,
) -> int:
    """Train and return the number of steps taken in all, earlier ones included.

    After each step the watcher is told that number; the training ends early when it says so. With `progress`, whose
    metrics these are, a training that was killed goes on where it was saved last, and ends with the same bits.
    Raises `NumericsError` naming the rows when a loss or gradient is not finite, or the tensor when weights are not;
    the model is then not to be used.
    """
    model.train()
    peaks = [group["lr"] for group in optimizer.param_groups]
    parts: dict[str, Stateful] = {"model": Weights(model), "optimizer": Moments(optimizer)}
    if watcher is not None:
        parts["watcher"] = watcher
    before = 0 if progress is None else progress.resume(parts, len(plan.steps))
    models = [model, *(on_the_same_weights(model) for _ in range(1, lanes(model)))]
    started, seen, taken = time.monotonic(), 0, plan.first_step + before
    for step, rows in enumerate(plan.steps[before:], start=before + 1):
        torch.manual_seed(derive(plan.seed, "dropout", taken))
        share = schedule(taken)
        _set_rates(optimizer, peaks, share)
        drawn = torch.get_rng_state()
        numbers = _backward(models, objective, rows, plan.micro_batch_tokens)
        if len(models) > 1 and not drawn.equal(torch.get_rng_state()):
            # There is dropout: which of several threads draws first is chance.
            del models[1:]
            torch.set_rng_state(drawn)
            optimizer.zero_grad(set_to_none=True)
            numbers = _backward(models, objective, rows, plan.micro_batch_tokens)
        norm = float(whole(nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_clip)))
        if not (math.isfinite(norm) and math.isfinite(numbers["loss/total"])):
            _refuse_overflow(model, taken)
            raise _not_finite(model, objective, rows, plan.micro_batch_tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken += 1
        seen += int(objective.lengths[rows].sum())
        numbers |= {"grad/norm": norm, "learning_rate": peaks[0] * share}
        for name, value in numbers.items():
            metrics.add(name, value, _UNITS.get(name, ""), taken)
        console.progress(_line(step, step - before, len(plan.steps), numbers["loss/total"], started, seen))
        if watcher is not None and watcher.after_step(taken):
            break
        if progress is not None:
            progress.after_step(step, parts)
    seconds = time.monotonic() - started
    metrics.add("speed/tokens_per_second", seen / max(seconds, 1e-9), "tokens/s")
    _set_rates(optimizer, peaks, 1.0)
    model.eval()
    _refuse_overflow(model, taken)
    return taken


_UNITS = {
    **dict.fromkeys(("loss/nll", "loss/documents", "entropy/mean", "kl/reference", "kl/old"), "nat"),
    **dict.fromkeys(("clip/low", "clip/high", "accuracy/pairs"), "fraction"),
    "loss/ranking": "nat",
    "loss/value": "reward^2",
    "value/mean": "reward",
}


def _set_rates(optimizer: torch.optim.Optimizer, peaks: Sequence[float], share: float) -> None:
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share


@wide_products()
def _backward(models: Sequence[nn.Module], objective: Objective, rows: Rows, budget: int) -> dict[str, float]:
    """Accumulate one step's gradient over micro-batches, and return the step's numbers.

    Each of `models`, which have the same weights, takes a share; the gradient is the first one's.
    """
    weighed, wide = objective.step(rows), len(models)
    if (shares := count() * wide) > 1:  # everyone is to have work
        budget = min(budget // wide, -(-int(objective.lengths[rows].sum()) // shares))
    kinds = [kind for kind in objective.passes(rows) if len(kind)]
    cut = partial(batches.micro_batches, budget=max(1, budget), packed=packs(models[0]), groups=objective.groups)
    micros = list(dealt([micro for kind in kinds for micro in cut(kind, objective.lengths)]))

    def share(lane: int) -> list[Losses]:
        return [_differentiated(models[lane], objective, *micro, weighed) for micro in micros[lane::wide]]

    numbers: dict[str, float] = {"loss/total": 0.0}
    largest: set[str] = set()
    for losses in chain.from_iterable(abreast(share, range(wide), wide)):
        numbers["loss/total"] += float(losses.total)
        for name, value in losses.parts.items():
            numbers[name] = numbers.get(name, 0.0) + value
        for name, value in losses.largest.items():
            numbers[name] = max(numbers.get(name, value), value)
        largest |= losses.largest.keys()
    gather_gradients(models)
    return added(numbers, frozenset(largest))


def _differentiated(model: nn.Module, objective: Objective, rows: Rows, counts: bool, weighed: Any) -> Losses:
    """Add a micro-batch's gradient to the model's, and return its losses; neither where it does not count."""
    losses = objective.losses(model, rows, weighed)
    (losses.total if counts else 0 * losses.total).backward()  # type: ignore[no-untyped-call]  # not annotated
    return replace(losses, total=losses.total.detach()) if counts else Losses(torch.zeros(()), {})


def _not_finite(model: nn.Module, objective: Objective, rows: Rows, budget: int) -> NumericsError:
    """The rows whose own loss is not finite, found one by one."""
    weighed = objective.step(rows)
    bad: list[int] = []
    with torch.no_grad():
        for row in rows:
            alone = objective.losses(model, np.array([row]), weighed)
            if not math.isfinite(float(alone.total)):
                bad.append(int(row))
    named = objective.names(np.array(bad[:10], dtype=np.int64)) if bad else ["none alone: the gradient overflowed"]
    return NumericsError(
        "the loss or its gradient is not finite",
        f"rows {', '.join(named)}",
        "look at them with `rlhf show`; lower the learning rate",
    )


def _refuse_overflow(model: nn.Module, taken: int) -> None:
    """Raise for weights that a step has made infinite though its gradient was finite."""
    for name, weights in released(model).named_parameters():
        if not all_finite(own(weights)):
            raise NumericsError(f"weights are not finite after step {taken}", name, "lower the learning rate")


def _line(step: int, here: int, total: int, loss: float, started: float, tokens: int) -> str:
    seconds = time.monotonic() - started
    left = seconds / here * (total - step)
    return f"step {step}/{total}  loss {loss:.4f}  {tokens / seconds:,.0f} tokens/s  {left:.0f} s left"
