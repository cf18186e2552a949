"""advantages (, critic, policy, reward_model) -> critic: regression on returns, before the loop and in it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from pipeline import ragged
from pipeline.algorithms.losses import LOSSES
from pipeline.algorithms.shelf import Line, Piece
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import ADVANTAGES, CRITIC, POLICY, REWARD_MODEL
from pipeline.errors import ContractError, ExperimentError, InputError, RecipeError
from pipeline.experiment import Experiment
from pipeline.models import adapters, checkpoint
from pipeline.models.distributed import shard, together
from pipeline.models.forward import packs, response_values
from pipeline.models.precision import computing
from pipeline.seeds import derive
from pipeline.stage import TrainingSettings, stage
from pipeline.text import Chat
from pipeline.training import batches
from pipeline.training.batches import Rows
from pipeline.training.explained import Convergence, Explained
from pipeline.training.loop import Losses, Plan, fit
from pipeline.training.optimizer import TRAINER, adamw, constant, load_state, save_state
from pipeline.training.progress import Progress, State

PRETRAINING_LOSS = Line(kind="value_squared")
"""Plain regression, as in algorithm 1 of arXiv:2503.01491: there are no old values to stay near to."""
SQUARED = "reward^2"


class Settings(TrainingSettings):
    """How to learn from returns."""

    loss: Line
    """A recipe line of the loss shelf that reads `returns`; pretraining always takes `value_squared`."""
    epochs: int = Field(1, ge=1)
    """Passes over the table, as those of the policy; pretraining counts steps instead."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass; not in pretraining."""
    steps: int | None = Field(None, ge=0)
    """Pretraining: most optimizer steps, 0 to write the critic as it starts. Absent: an iteration's walk, `epochs`."""
    batch: int = Field(64, ge=1)
    """Pretraining: responses per optimizer step."""
    held_out_share: float = Field(0.1, ge=0, lt=1)
    """Pretraining: share of the prompts that are not trained on and tell when to stop; at 0 all rows tell."""
    check_every: int = Field(5, ge=1)
    """Pretraining: optimizer steps between two looks at the held-out prompts."""
    patience: int = Field(3, ge=1)
    """Pretraining: stop after so many looks in a row without a gain; the last weights are kept, not the best."""
    min_gain: float = Field(0.01, ge=0)
    """Pretraining: a gain is a loss lower by more than this share, or an explained variance higher by more than it."""
    learning_rate: float = Field(gt=0)
    """After the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up over the whole run, pretraining included; constant after that."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`recipe.critic.loss`, epochs and minibatches of `recipe.update`, `critic`; with `steps`, its pretraining.

        Raises `ExperimentError` when the recipe has no critic.
        """
        recipe, plan, scale = experiment.recipe, experiment.critic, experiment.scale
        if recipe.critic is None:
            raise ExperimentError(
                f"recipe {recipe.name} has no critic: there are no values to learn", "recipe.critic",
                "take a recipe with a critic; `rlhf recipes` lists the models that each needs",
            )  # fmt: skip
        named = {"batch": "pretrain_batch", "check_every": "pretrain_check_every", "patience": "pretrain_patience"}
        pretraining = {ours: getattr(plan, theirs) for ours, theirs in named.items()}
        return {
            "loss": recipe.critic.loss, "epochs": recipe.update.epochs, "minibatches": recipe.update.minibatches,
            "learning_rate": plan.learning_rate or scale.learning_rate, "warmup_steps": plan.warmup_steps,
            "weight_decay": plan.weight_decay, "lora": plan.lora, 
            **cls.training(experiment),
            **(pretraining if changes.get("steps") is not None else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Responses with their returns, and the model to start from: one of three. `steps = 0` needs no responses."""

    advantages: Annotated[Artifact | None, ADVANTAGES] = None
    critic: Annotated[Artifact | None, CRITIC] = None
    policy: Annotated[Artifact | None, POLICY] = None
    reward_model: Annotated[Artifact | None, REWARD_MODEL] = None


class Regression:
    """The objective: the token mean of the piece's loss over an optimizer step.

        L = 1/N sum_t L_t                              N: response tokens of the whole step

    As in lm-human-preferences cbfd210b. The recipe's `update.weights` are the policy's alone.
    """

    def __init__(self, table: pa.Table, piece: Piece[Tensor]) -> None:
        self.piece = piece
        self.prompts, self.responses = (table[name].to_pylist() for name in ("prompt_tokens", "response_tokens"))
        self.lengths = np.array([len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)])
        self.prompt_ids = table["prompt_id"].to_pylist()
        self.groups = np.unique(self.prompt_ids, return_inverse=True)[1]
        self.samples = table["sample"].to_pylist()
        self.mask = ragged.mask_of(ragged.lengths(table["response_tokens"]))
        self.returns = ragged.pad(table["returns"], self.mask.shape[1])
        self.old_values: Float[np.ndarray, "M T"] | None = None
        """What the critic said when the advantages were made; None where the table does not tell."""
        if "values" in table.column_names and table["values"].null_count == 0:
            self.old_values = ragged.pad(table["values"], self.mask.shape[1])

    def passes(self, rows: Rows) -> Sequence[Rows]:
        """All rows are of one kind."""
        return [rows]

    def step(self, rows: Rows) -> int:
        """The number of response tokens in the step."""
        return int(self.mask[rows].sum())

    def losses(self, model: nn.Module, rows: Rows, step: int) -> Losses:
        """Its share of the token mean over the step."""
        read = self._read(model, rows)
        place, width = read.values.device, read.values.shape[1]
        columns = {"values": read.values, "mask": read.mask}
        for name, known in (("returns", self.returns), ("old_values", self.old_values)):
            if known is not None:
                columns[name] = torch.from_numpy(known[rows][:, :width]).to(place)
        weights = read.mask / step
        total = (weights * self.piece(columns)).sum()
        mean = (weights * read.values.detach()).sum()
        return Losses(total, {"loss/value": float(total.detach()), "value/mean": float(mean)})

    def values(self, model: nn.Module, rows: Rows, budget: int) -> Float[np.ndarray, "N T"]:
        """What the critic says of rows, `budget` padded tokens of them at a time."""
        training = model.training
        values = np.zeros(self.mask.shape, dtype=np.float32)
        model.eval()
        read = torch.no_grad()(lambda some: self._read(model, some).values.cpu().numpy())
        cut = batches.micro_batches(rows, self.lengths, budget, packed=packs(model), groups=self.groups)
        for some, found in together(list(cut), read, model):
            values[some, : found.shape[1]] = found
        model.train(training)
        of_rows: Float[np.ndarray, "N T"] = values[rows]
        return of_rows

    def explained(self, values: Float[np.ndarray, "N T"], rows: Rows) -> Explained:
        """How well values predict the returns of rows."""
        return Explained.of(values, self.returns[rows], self.mask[rows])

    def names(self, rows: Rows) -> list[str]:
        """Rows as prompt_id/sample."""
        return [f"{self.prompt_ids[row]}/{self.samples[row]}" for row in rows]

    def _read(self, model: nn.Module, rows: Rows) -> Any:
        return response_values(model, [self.prompts[row] for row in rows], [self.responses[row] for row in rows])


@dataclass
class Watch:
    """Looks at a critic on rows, in pretraining every few steps, and says when to stop."""

    objective: Regression
    model: nn.Module
    rows: Rows
    settings: Settings
    out: Outbox
    convergence: Convergence | None = None
    """None: there is no early end."""
    seen: dict[int, Explained] = field(default_factory=dict)
    """Optimizer steps taken -> what was found then."""

    def begin(self, taken: int) -> None:
        """Measure the critic that the training starts from.

        In an iteration these are the table's own values where it has them: what the advantages were made of.
        """
        known = self.objective.old_values if self.settings.steps is None else None
        found = self._look() if known is None else self.objective.explained(known[self.rows], self.rows)
        self.seen[taken] = found
        self.out.metrics.add("loss/value_before", found.loss, SQUARED)
        self.out.metrics.add("value/explained_variance_before", found.variance)
        if self.settings.steps is not None:
            self.convergence = Convergence(found.loss, found.variance, self.settings.min_gain, self.settings.patience)

    def after_step(self, taken: int) -> bool:
        """Measure at every check, as a curve over optimizer steps; True when the critic has converged."""
        if self.convergence is None or (taken - min(self.seen)) % self.settings.check_every:
            return False
        self.seen[taken] = self._look()
        self._record(self.seen[taken], taken)
        return self.convergence.reached(self.seen[taken])

    def state(self) -> State:
        """How far from converged the critic is. What was seen besides can be seen again."""
        return State({}, {"convergence": self.convergence and asdict(self.convergence)})

    def resume(self, state: State) -> None:
        """Be that far."""
        kept = state.values["convergence"]
        self.convergence = kept and Convergence(**kept)

    def end(self, taken: int) -> None:
        """Measure the trained critic and say how it went."""
        before = self.seen[min(self.seen)]
        found = self.seen.get(taken) or self._look()
        self._record(found, 0)
        self.out.stats["value/explained_variance"] = found.variance
        if self.convergence is not None:
            steps, early = taken - min(self.seen), ""
            if steps < (self.settings.steps or 0):
                early = f" of {self.settings.steps}: no gain in {self.convergence.stale} checks"
            self.out.say(
                f"{steps} steps{early}; explained variance {before.variance:.3f} -> {found.variance:.3f}, "
                f"loss {before.loss:.4f} -> {found.loss:.4f}"
            )

    def _look(self) -> Explained:
        values = self.objective.values(self.model, self.rows, self.settings.micro_batch_tokens)
        return self.objective.explained(values, self.rows)

    def _record(self, found: Explained, step: int) -> None:
        self.out.metrics.add("loss/value_after", found.loss, SQUARED, step)
        self.out.metrics.add("value/explained_variance", found.variance, "", step)
        for first, variance in found.by_position.items():
            self.out.metrics.add(f"value/explained_variance/from_{first}", variance, "", step)


def dealt(trained: Rows, settings: Settings, taken: int) -> list[Rows]:
    """The rows of every optimizer step."""
    seed = derive(settings.seed, "value", taken)
    if settings.steps is None:
        return [trained[rows] for rows in batches.dealt(len(trained), settings.epochs, settings.minibatches, seed)]
    stream = batches.drawn(len(trained), 0, settings.steps * settings.batch, seed)
    return list(trained[stream].reshape(settings.steps, settings.batch))


def _objective(advantages: Artifact | None, settings: Settings) -> Regression | None:
    """The table as an objective; None where nothing is to be learned."""
    if advantages is None:
        if settings.steps == 0:
            return None
        raise InputError("there are no responses to learn from", do="name them with --advantages PATH")
    table, where = advantages.table(), str(advantages.path)
    if table["returns"].null_count:
        raise ContractError(
            "the table has no returns: the advantage piece that made it gives a critic nothing to learn", where,
            "make it with a piece that does: `rlhf stage advantage --set advantage.kind=reward_to_go`, or gae",
        )  # fmt: skip
    if settings.steps is None and table.num_rows < settings.minibatches:
        raise ContractError(
            f"{table.num_rows} rows cannot be dealt to {settings.minibatches} minibatches", where,
            "raise scale.groups, or lower update.minibatches in recipe_changes",
        )  # fmt: skip
    objective = Regression(table, LOSSES.take(settings.loss if settings.steps is None else PRETRAINING_LOSS))
    _check_piece(objective, where)
    return objective


def _check_piece(objective: Regression, where: str) -> None:
    """Raise unless the loss is one for a critic and the table has what it reads."""
    piece = objective.piece
    if not {"values", "returns"} <= set(piece.needs) <= {"values", "returns", "old_values", "mask"}:
        raise RecipeError(
            f"loss {piece.name!r} is none of a critic: it reads {', '.join(piece.needs)}", "critic.loss",
            "take a piece that compares values with returns, such as value_squared",
        )  # fmt: skip
    if "old_values" in piece.needs and objective.old_values is None:
        raise ContractError(
            f"loss {piece.name!r} stays near the old values, and the table has no column values", where,
            "run `score` with the critic, and `advantage` on these scores",
        )  # fmt: skip


def _start(inputs: Inputs) -> tuple[Path, checkpoint.Kind]:
    """The directory of the model to start from, and what it is."""
    kinds: tuple[checkpoint.Kind, ...] = ("critic", "policy", "reward_model")
    given = [(artifact.path, kind) for kind in kinds if (artifact := getattr(inputs, kind)) is not None]
    if len(given) != 1:
        found = "none is" if not given else f"{len(given)} are"
        raise InputError(
            f"a critic starts from a critic, a policy or a reward model, and {found} given",
            do="name one of them, with --critic PATH, --policy PATH or --reward-model PATH",
        )
    return given[0]


@stage(writes=CRITIC, version=1, hardware="gpu", ranks=True)
def value(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Regress the critic on returns, and measure how much of them it explains."""
    start, kind = _start(inputs)
    objective = _objective(inputs.advantages, settings)
    checkpoint.inspect(start, kind)
    model = checkpoint.fresh_critic(start, derive(settings.seed, "value head"))
    before = start / TRAINER if kind == "critic" else None
    model = adapters.attached(model, settings.lora, derive(settings.seed, "adapters"), before)
    model = shard(computing(model, settings.compute_dtype, settings.recompute))
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay, offload=settings.offload)
    taken = load_state(optimizer, start) if kind == "critic" else 0
    if objective is not None:
        share = 0.0 if settings.steps is None else settings.held_out_share
        kept_back = batches.held_out(objective.prompt_ids, share, settings.seed)
        trained, apart = np.flatnonzero(~kept_back), np.flatnonzero(kept_back)
        out.metrics.add("rows/train", len(trained), "rows")
        out.metrics.add("rows/held_out", len(apart), "rows")
        watch = Watch(objective, model, apart if len(apart) else trained, settings, out)
        watch.begin(taken)
        steps = dealt(trained, settings, taken)
        plan = Plan(steps, settings.micro_batch_tokens, settings.gradient_clip, taken, settings.seed)
        schedule, progress = constant(settings.warmup_steps), Progress(out, settings.save_every)
        taken = fit(model, objective, optimizer, schedule, plan, out.metrics, watch, progress)
        watch.end(taken)
    out.stats["steps"] = taken
    save_state(optimizer, taken, out.path)
    out.settle()
    checkpoint.save(model, Chat(start).tokenizer, out.path)
    adapters.save(model, out.path / TRAINER)


if __name__ == "__main__":
    value.main()
