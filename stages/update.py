"""advantages, policy (, documents) -> policy: the recipe's losses, weighted, summed and stepped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline import ragged
from pipeline.algorithms.losses import LOSSES, ratios
from pipeline.algorithms.recipe import LossLine, Mix, Update
from pipeline.algorithms.shelf import Piece
from pipeline.algorithms.weights import WEIGHTS
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import ADVANTAGES, DOCUMENTS, POLICY
from pipeline.errors import ContractError, ExperimentError
from pipeline.experiment import Experiment
from pipeline.metrics import Metrics
from pipeline.models import adapters, checkpoint
from pipeline.models.distributed import everybody, shard
from pipeline.models.forward import response_logprobs
from pipeline.models.precision import computing
from pipeline.seeds import derive
from pipeline.stage import TrainingSettings, stage
from pipeline.text import Chat
from pipeline.training import batches
from pipeline.training.averaging import Average
from pipeline.training.batches import Rows
from pipeline.training.imitation import Example, Imitation, windows
from pipeline.training.loop import Losses, Objective, Plan, fit
from pipeline.training.optimizer import TRAINER, adamw, constant, load_state, save_state
from pipeline.training.policies import divergence, mismatch
from pipeline.training.progress import Progress


class Settings(TrainingSettings):
    """The recipe's loss and how to step it."""

    loss: tuple[LossLine, ...] = Field(min_length=1)
    """Recipe lines of the loss shelf; the terms are summed."""
    update: Update
    """What tokens count, epochs and minibatches; the average of the weights."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of the responses' log-probabilities, here as in `score`; documents are read at 1."""
    mix: Mix | None = None
    """Documents in every optimizer step; none when absent."""
    document_tokens: int = Field(1024, ge=2)
    """Longer documents are cut into windows of so many tokens."""
    learning_rate: float = Field(gt=0)
    """After the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up over the whole run; constant after that."""

    @model_validator(mode="after")
    def _averages_whole_weights(self) -> Self:
        if self.lora is not None and self.update.ema is not None:
            raise ValueError("lora: update.ema averages whole weights; take one of the two out")
        return self

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`recipe.loss`, `recipe.update`, `recipe.mix`; rates and lengths from `scale`."""
        recipe, scale = experiment.recipe, experiment.scale
        named = ("learning_rate", "warmup_steps", "weight_decay", "lora")
        return {
            "loss": recipe.loss, "update": recipe.update, "temperature": recipe.temperature, "mix": recipe.mix,
            "document_tokens": scale.prompt_tokens + scale.response_tokens,
            **cls.training(experiment),
            **{name: getattr(scale, name) for name in named},
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What to learn from, the policy that wrote it, and plain text to mix in."""

    advantages: Annotated[Artifact, ADVANTAGES]
    policy: Annotated[Artifact, POLICY]
    documents: Annotated[Artifact | None, DOCUMENTS] = None


_MASKS = ("correct", "finished")
"""Columns of the table that say which rows a term may be restricted to."""


@dataclass(frozen=True)
class Term:
    """One summand of the loss."""

    piece: Piece[Tensor]
    coef: float
    on: str
    """Rows whose tokens count: `all`, `correct` or `finished`."""

    @classmethod
    def of(cls, line: LossLine) -> "Term":
        """Take the piece of a loss line from its shelf."""
        return cls(LOSSES.take(line), line.coef, line.on)


@dataclass(frozen=True)
class Weighed:
    """What every token of an optimizer step counts in every term: [rows of the step, T], and where a row stands."""

    place: Mapping[int, int]
    weights: list[Tensor]
    token_mean: Tensor
    """For the numbers worth logging: each token of the step counts the same."""


class Improvement:
    """The objective: sum over terms of coef times the weighted sum of the term's token losses.

    In an update of one step (`one_step`) the policy is still the one that sampled when it reads a row. What it finds
    are the row's old log-probabilities where the table has none, and `first` keeps them.
    """

    def __init__(
        self, table: pa.Table, terms: Sequence[Term], weigh: Callable[[Tensor, Tensor], Tensor], temperature: float,
        *, one_step: bool = False,
    ) -> None:  # fmt: skip
        self.terms, self.weigh, self.temperature = terms, weigh, temperature
        self.prompts, self.responses = (table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
        self.lengths = np.array([len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)])
        self.keys = [
            f"{i}/{s}" for i, s in zip(table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
        ]
        self.mask = torch.from_numpy(ragged.mask_of(ragged.lengths(table["response_tokens"])))
        self.groups = np.unique(table["prompt_id"].to_pylist(), return_inverse=True)[1]
        self.counted = {
            "all": torch.ones(len(self.mask), dtype=torch.bool),
            **{name: torch.tensor([bool(value) for value in table[name].to_pylist()]) for name in _MASKS},
        }
        names = ("advantages", "old_logprobs", "ref_logprobs")
        self.columns = {
            name: torch.from_numpy(ragged.pad(table[name], self.mask.shape[1]))
            for name in names
            if name in table.column_names and table[name].null_count == 0
        }
        self.first: list[np.ndarray] | None = None
        if one_step and "old_logprobs" not in self.columns:
            self.first = [np.empty(0, np.float32)] * len(self.lengths)

    def passes(self, rows: Rows) -> Sequence[Rows]:
        """All rows are of one kind."""
        return [rows]

    def step(self, rows: Rows) -> Weighed:
        """Weigh the tokens of a whole optimizer step, before it is cut."""
        mask, group = self.mask[rows], torch.from_numpy(self.groups[rows])
        weights = [self.weigh(mask & self.counted[term.on][rows][:, None], group) for term in self.terms]
        place = {int(row): index for index, row in enumerate(rows)}
        return Weighed(place, weights, WEIGHTS["token_mean"](mask, group))

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
        given = {**columns, "old_logprobs": self._keep(rows, read.logprobs)} if self.first is not None else columns
        parts: dict[str, float] = {}
        total = torch.zeros((), device=device)
        for term, weights in zip(self.terms, step.weights, strict=True):
            share = (weights[places][:, :width].to(device) * term.piece(given)).sum()
            total = total + term.coef * share
            parts[f"loss/{term.piece.name}"] = parts.get(f"loss/{term.piece.name}", 0.0) + float(share.detach())
        counts = step.token_mean[places][:, :width].to(device)
        shares, largest = self._numbers({name: column.detach() for name, column in columns.items()})
        parts |= {name: float((counts * value).sum()) for name, value in shares.items()}
        return Losses(total, parts, largest)

    def _keep(self, rows: Rows, logprobs: Tensor) -> Tensor:
        found = logprobs.detach()
        assert self.first is not None  # noqa: S101  # for the type checker
        for row, numbers in zip(rows, found.cpu().numpy(), strict=True):
            self.first[row] = numbers[: len(self.responses[row])]
        return found

    def _numbers(self, columns: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What tells how the step goes: numbers per token, and the largest of others."""
        numbers, largest = {"entropy/mean": columns["entropies"]}, {}
        if "ref_logprobs" in columns:
            d = columns["ref_logprobs"] - columns["logprobs"]
            numbers["kl/reference"] = torch.exp(d) - d - 1
        if "old_logprobs" in columns:
            d = columns["old_logprobs"] - columns["logprobs"]
            numbers["kl/old"] = torch.exp(d) - d - 1
            clip = next((term.piece.settings for term in self.terms if "clip_low" in term.piece.settings), {})
            ratio = ratios(
                columns["logprobs"], columns["old_logprobs"], columns["mask"], ratio=clip.get("ratio", "token")
            )
            largest["ratio/max"] = float(torch.where(columns["mask"], ratio, 0).max())
            if clip:
                low, high, advantages = 1 - clip["clip_low"], 1 + clip["clip_high"], columns["advantages"]
                numbers["clip/low"] = ((ratio < low) & (advantages < 0)).float()
                numbers["clip/high"] = ((ratio > high) & (advantages > 0)).float()
        return numbers, largest

    def names(self, rows: Rows) -> list[str]:
        """Rows as prompt_id/sample."""
        return [self.keys[row] for row in rows]


class Rehearsal:
    """The objective with documents: its loss plus `coef` times the mean negative log-likelihood of their tokens.

        L = L_policy + coef * L_documents         one gradient, one optimizer step (arXiv:2203.02155, appendix C.4)

    Rows from `first` on are windows of documents.
    """

    def __init__(self, improvement: Improvement, documents: Sequence[Example], coef: float) -> None:
        self.improvement, self.imitation, self.coef = improvement, Imitation(documents), coef
        self.first = len(improvement.lengths)
        self.lengths = np.concatenate([improvement.lengths, self.imitation.lengths])
        apart = len(self.lengths) + np.arange(len(self.imitation.lengths))
        self.groups = np.concatenate([improvement.groups, apart])

    def passes(self, rows: Rows) -> Sequence[Rows]:
        """Responses and documents: they are read at temperatures of their own."""
        return [rows[rows < self.first], rows[rows >= self.first]]

    def step(self, rows: Rows) -> tuple[Weighed, int]:
        """Weigh the responses' tokens and count the documents'."""
        responses, documents = self.passes(rows)
        return self.improvement.step(responses), self.imitation.step(documents - self.first)

    def losses(self, model: nn.Module, rows: Rows, step: tuple[Weighed, int]) -> Losses:
        """A micro-batch's share of the step's loss and numbers: of responses, or of documents."""
        if rows[0] < self.first:
            return self.improvement.losses(model, rows, step[0])
        read = self.imitation.losses(model, rows - self.first, step[1])
        return Losses(self.coef * read.total, {"loss/documents": float(read.total.detach())})

    def names(self, rows: Rows) -> list[str]:
        """Responses as prompt_id/sample, documents by their id."""
        responses, documents = self.passes(rows)
        return [*self.improvement.names(responses), *self.imitation.names(documents - self.first)]


def with_documents(
    steps: Sequence[Rows], per_response: float, first: int, count: int, cursor: int, seed: int
) -> tuple[list[Rows], int]:
    """Add round(`per_response` * rows) documents to each step, and return where the stream of documents stands then.

    Documents are the `count` rows from `first` on; the stream goes on at place `cursor`.
    """
    mixed = []
    for rows in steps:
        wanted = round(per_response * len(rows))
        mixed.append(np.concatenate([rows, first + batches.drawn(count, cursor, wanted, seed)]))
        cursor += wanted
    return mixed, cursor


@stage(writes=POLICY, version=2, hardware="gpu", ranks=True)
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
    model = checkpoint.load_policy(inputs.policy.path, "float32")
    model = adapters.attached(model, settings.lora, derive(settings.seed, "adapters"), inputs.policy.path / TRAINER)
    model = shard(computing(model, settings.compute_dtype, settings.recompute))
    tokenizer = Chat(inputs.policy.path).tokenizer
    terms = [Term.of(line) for line in settings.loss]
    plan = settings.update
    improvement = Improvement(table, terms, WEIGHTS[plan.weights], settings.temperature, one_step=plan.steps == 1)
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay, offload=settings.offload)
    taken = load_state(optimizer, inputs.policy.path)
    steps = batches.dealt(table.num_rows, plan.epochs, plan.minibatches, derive(settings.seed, "update", taken))
    objective, steps = _mixed(improvement, steps, inputs, settings, out)
    average = None if plan.ema is None else Average(model, plan.ema, inputs.policy.path)
    taken = fit(
        model, objective, optimizer, constant(settings.warmup_steps),
        Plan(steps, settings.micro_batch_tokens, settings.gradient_clip, taken, settings.seed), out.metrics,
        average, Progress(out, settings.save_every),
    )  # fmt: skip
    if improvement.first is not None:
        improvement.first = collected(improvement.first)
    out.stats |= {"steps": taken, **told(out.metrics), **_distances(table, improvement, out)}
    save_state(optimizer, taken, out.path)
    out.settle()
    checkpoint.save(model, tokenizer, out.path)
    adapters.save(model, out.path / TRAINER)
    if average is not None:
        average.save(tokenizer, out.path)


def collected(first: list[np.ndarray]) -> list[np.ndarray]:
    """What some rank has read of each row."""
    return [max(found, key=len) for found in zip(*everybody(first), strict=True)]


def told(metrics: Metrics) -> dict[str, float]:
    """What gates between stages look at, of the steps of this update; what was not measured is left out."""
    over_steps: dict[str, Callable[[list[float]], Any]] = {
        "entropy/mean": np.mean, "ratio/max": max, "grad/norm": max, "kl/old": itemgetter(-1),
    }  # fmt: skip
    found = {name: [row["value"] for row in metrics.rows if row["name"] == name] for name in over_steps}
    return {name: float(over_steps[name](values)) for name, values in found.items() if values}


def _distances(table: pa.Table, improvement: Improvement, out: Outbox) -> dict[str, float]:
    """Measure what `score` measures where it reads old log-probabilities: sampler, policy and reference apart."""
    if improvement.first is None:
        return {}
    old = ragged.from_rows(improvement.first, pa.float32())
    numbers = mismatch(table["sampler_logprobs"], old) if "sampler_logprobs" in table.column_names else {}
    if "ref_logprobs" in improvement.columns:
        # Its mean over tokens is `kl/reference` there; here that is what the loss measures, of each step.
        name = "kl/reference_sum"
        numbers[name] = divergence(old, table["ref_logprobs"].combine_chunks())[name]
    for name, (value, unit) in numbers.items():
        out.metrics.add(name, value, unit)
    return {name: value for name, (value, _) in numbers.items()}


def _mixed(
    improvement: Improvement, steps: list[Rows], inputs: Inputs, settings: Settings, out: Outbox
) -> tuple[Objective, list[Rows]]:
    """The objective and the rows of its steps, with documents where the recipe mixes them in.

    `documents` among the artifact's stats says how many were taken from their stream; the next update goes on there.
    """
    if settings.mix is None:
        return improvement, steps
    if inputs.documents is None:
        raise ExperimentError(
            "the recipe mixes in documents, and there are none",
            do="name some in the experiment as data.documents, or here with --documents PATH",
        )
    rows = inputs.documents.table(["document_id", "text"]).to_pylist()
    documents = windows(rows, Chat(inputs.policy.path), settings.document_tokens)
    before = inputs.policy
    start = int(before.stats.get("documents", 0)) if before.manifest.stage == out.stage else 0
    mixed, end = with_documents(
        steps, settings.mix.per_response, len(improvement.lengths), len(documents), start,
        derive(settings.seed, "documents"),
    )  # fmt: skip
    out.stats["documents"] = end
    out.metrics.add("rows/documents", end - start, "rows")
    return Rehearsal(improvement, documents, settings.mix.coef), mixed


if __name__ == "__main__":
    update.main()
