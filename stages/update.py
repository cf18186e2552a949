"""advantages, policy -> policy: the recipe's losses, weighted, summed and stepped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import ragged
from pipeline.algorithms.losses import LOSSES
from pipeline.algorithms.recipe import LossLine, Update
from pipeline.algorithms.shelf import Piece
from pipeline.algorithms.weights import WEIGHTS
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import ADVANTAGES, POLICY
from pipeline.errors import ContractError
from pipeline.experiment import Experiment
from pipeline.models import checkpoint
from pipeline.models.device import device
from pipeline.models.forward import response_logprobs
from pipeline.seeds import derive
from pipeline.stage import StageSettings, stage
from pipeline.text import Chat
from pipeline.training.batches import Rows
from pipeline.training.loop import Losses, Plan, fit
from pipeline.training.optimizer import adamw, constant, load_state, save_state


class Settings(StageSettings):
    """The recipe's loss and how to step it."""

    loss: tuple[LossLine, ...] = Field(min_length=1)
    """Recipe lines of the loss shelf; the terms are summed."""
    update: Update
    """What tokens count, epochs and minibatches."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampling: log-probabilities are of the distribution that was sampled from."""
    learning_rate: float = Field(gt=0)
    """After the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up over the whole run; constant after that."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, of all matrices."""
    gradient_clip: float = Field(1.0, gt=0)
    """Longest gradient; a longer one is scaled down to it."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens that fit into memory at once."""
    seed: int = 0
    """Of the run: the order of the rows follows from it."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`recipe.loss`, `recipe.update`; rates from `scale`."""
        recipe, scale = experiment.recipe, experiment.scale
        named = ("learning_rate", "warmup_steps", "weight_decay", "gradient_clip")
        return {
            "loss": recipe.loss, "update": recipe.update, "temperature": recipe.rollout.temperature,
            "micro_batch_tokens": experiment.resources.micro_batch_tokens, "seed": experiment.seed,
            **{name: getattr(scale, name) for name in named},
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What to learn from, and the policy that wrote it."""

    advantages: Annotated[Artifact, ADVANTAGES]
    policy: Annotated[Artifact, POLICY]


@dataclass(frozen=True)
class Term:
    """One summand of the loss."""

    piece: Piece[Tensor]
    coef: float
    correct_only: bool

    @classmethod
    def of(cls, line: LossLine) -> "Term":
        """Take the piece of a loss line from its shelf."""
        return cls(LOSSES.take(line), line.coef, line.on == "correct")


@dataclass(frozen=True)
class Weighed:
    """What every token of an optimizer step counts in every term: [rows of the step, T], and where a row stands."""

    place: Mapping[int, int]
    weights: list[Tensor]
    token_mean: Tensor
    """For the numbers worth logging: each token of the step counts the same."""


class Improvement:
    """The objective: sum over terms of coef times the weighted sum of the term's token losses."""

    def __init__(
        self, table: pa.Table, terms: Sequence[Term], weigh: Callable[[Tensor], Tensor], temperature: float
    ) -> None:
        self.terms, self.weigh, self.temperature = terms, weigh, temperature
        self.prompts, self.responses = (table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
        self.lengths = np.array([len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)])
        self.keys = [
            f"{i}/{s}" for i, s in zip(table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
        ]
        self.mask = torch.from_numpy(ragged.mask_of(ragged.lengths(table["response_tokens"])))
        self.correct = torch.tensor([bool(right) for right in table["correct"].to_pylist()])
        names = ("advantages", "old_logprobs", "ref_logprobs", "values", "returns")
        self.columns = {
            name: torch.from_numpy(ragged.pad(table[name], self.mask.shape[1]))
            for name in names
            if name in table.column_names and table[name].null_count == 0
        }

    def step(self, rows: Rows) -> Weighed:
        """Weigh the tokens of a whole optimizer step, before it is cut."""
        mask = self.mask[rows]
        right = mask & self.correct[rows][:, None]
        weights = [self.weigh(right if term.correct_only else mask) for term in self.terms]
        place = {int(row): index for index, row in enumerate(rows)}
        return Weighed(place, weights, WEIGHTS["token_mean"](mask))

    def losses(self, model: nn.Module, rows: Rows, step: Weighed) -> Losses:
        """A micro-batch's share of the step's loss and numbers."""
        read = response_logprobs(
            model, [self.prompts[r] for r in rows], [self.responses[r] for r in rows],
            temperature=self.temperature, entropy=True,
        )  # fmt: skip
        width, device = read.logprobs.shape[1], read.logprobs.device
        places = [step.place[int(row)] for row in rows]
        columns: dict[str, Tensor] = {name: values[rows][:, :width].to(device) for name, values in self.columns.items()}
        columns |= {
            "logprobs": read.logprobs,
            "entropies": torch.zeros_like(read.logprobs) if read.entropies is None else read.entropies,
            "mask": self.mask[rows][:, :width].to(device),
        }
        parts: dict[str, float] = {}
        total = torch.zeros((), device=device)
        for term, weights in zip(self.terms, step.weights, strict=True):
            share = (weights[places][:, :width].to(device) * term.piece(columns)).sum()
            total = total + term.coef * share
            parts[f"loss/{term.piece.name}"] = parts.get(f"loss/{term.piece.name}", 0.0) + float(share.detach())
        counts = step.token_mean[places][:, :width].to(device)
        return Losses(total, parts | self._numbers({n: c.detach() for n, c in columns.items()}, counts))

    def _numbers(self, columns: Mapping[str, Tensor], counts: Tensor) -> dict[str, float]:
        """Token means of what tells how the step goes."""
        numbers = {"entropy/mean": columns["entropies"]}
        if "ref_logprobs" in columns:
            d = columns["ref_logprobs"] - columns["logprobs"]
            numbers["kl/reference"] = torch.exp(d) - d - 1
        if "old_logprobs" in columns:
            d = columns["old_logprobs"] - columns["logprobs"]
            numbers["kl/old"] = torch.exp(d) - d - 1
            numbers |= self._clipped(torch.exp(-d), columns["advantages"])
        return {name: float((counts * value).sum()) for name, value in numbers.items()}

    def _clipped(self, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """Tokens whose gradient the clip stops, below and above."""
        clips = [term.piece.settings for term in self.terms if "clip_low" in term.piece.settings]
        if not clips:
            return {}
        low, high = float(clips[0]["clip_low"]), float(clips[0]["clip_high"])
        return {
            "clip/low": ((ratio < 1 - low) & (advantages < 0)).float(),
            "clip/high": ((ratio > 1 + high) & (advantages > 0)).float(),
        }

    def names(self, rows: Rows) -> list[str]:
        """Rows as prompt_id/sample."""
        return [self.keys[row] for row in rows]


@stage(writes=POLICY, version=1, hardware="gpu")
def update(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Step the policy along the recipe's losses."""
    table = inputs.advantages.table()
    if table.num_rows < settings.update.minibatches:
        raise ContractError(
            f"{table.num_rows} rows cannot be dealt to {settings.update.minibatches} minibatches",
            str(inputs.advantages.path),
            "raise scale.groups, or lower update.minibatches in recipe_changes",
        )
    checkpoint.inspect(inputs.policy.path)
    model = checkpoint.load_policy(inputs.policy.path, "float32").to(device())
    terms = [Term.of(line) for line in settings.loss]
    objective = Improvement(table, terms, WEIGHTS[settings.update.weights], settings.temperature)
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay)
    taken = load_state(optimizer, inputs.policy.path)
    plan = Plan(
        epochs=settings.update.epochs, minibatches=settings.update.minibatches,
        micro_batch_tokens=settings.micro_batch_tokens, gradient_clip=settings.gradient_clip,
        seed=derive(settings.seed, "update", taken), first_step=taken,
    )  # fmt: skip
    steps = fit(model, objective, optimizer, constant(settings.warmup_steps), plan, out.metrics)
    out.stats["steps"] = steps
    checkpoint.save(model, Chat(inputs.policy.path).tokenizer, out.path)
    save_state(optimizer, steps, out.path)


if __name__ == "__main__":
    update.main()
