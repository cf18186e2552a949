"""demonstrations (, policy) -> policy: next-token likelihood on the assistant's tokens; a new model if none given."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from pipeline.algorithms.losses import nll
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import DEMONSTRATIONS, POLICY
from pipeline.errors import ContractError, ExperimentError
from pipeline.experiment import Experiment
from pipeline.models import checkpoint
from pipeline.models.device import device
from pipeline.models.forward import response_logprobs
from pipeline.models.fresh import ModelSpec, create
from pipeline.seeds import derive
from pipeline.stage import StageSettings, stage
from pipeline.text import Chat
from pipeline.training.batches import Rows
from pipeline.training.loop import Losses, Plan, fit
from pipeline.training.optimizer import adamw, cosine


class Settings(StageSettings):
    """How to imitate."""

    new: ModelSpec | None = None
    """Shape and tokenizer of the model to create; used when no `--policy` is given."""
    epochs: int = Field(1, ge=1)
    """Passes over the demonstrations."""
    batch: int = Field(64, ge=1)
    """Demonstrations per optimizer step."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak of the schedule."""
    warmup_share: float = Field(0.03, ge=0, le=1)
    """Share of the steps over which the rate rises linearly."""
    final_share: float = Field(0.1, ge=0, le=1)
    """Cosine decay ends at this share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, of all matrices."""
    gradient_clip: float = Field(1.0, gt=0)
    """Longest gradient; a longer one is scaled down to it."""
    tokens: int = Field(1024, ge=1)
    """Longer demonstrations are left out and counted, never cut."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens that fit into memory at once."""
    seed: int = 0
    """Of the run: a new model's weights and the order of the rows follow from it."""

    @model_validator(mode="after")
    def _long_enough(self) -> Self:
        if self.new is not None and self.new.max_position < self.tokens:
            raise ValueError(f"new.max_position = {self.new.max_position} is less than tokens = {self.tokens}")
        return self

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`sft`, `models.new`, and lengths from `scale`."""
        plan, models, scale = experiment.sft.model_dump(exclude={"enabled"}), experiment.models, experiment.scale
        return {
            **plan, "new": models.new if models.policy is None else None, "gradient_clip": scale.gradient_clip,
            "tokens": scale.prompt_tokens + scale.response_tokens, "seed": experiment.seed,
            "micro_batch_tokens": experiment.resources.micro_batch_tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What to imitate, and the model to start from."""

    demonstrations: Annotated[Artifact, DEMONSTRATIONS]
    policy: Annotated[Artifact | None, POLICY] = None


@dataclass(frozen=True)
class Imitation:
    """The objective: mean negative log-likelihood over the assistant tokens of an optimizer step."""

    prompts: list[list[int]]
    """Tokens before the first one of the assistant."""
    targets: list[list[int]]
    masks: list[list[bool]]
    """True on the assistant's tokens among the targets."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per demonstration."""
        return np.array([len(p) + len(t) for p, t in zip(self.prompts, self.targets, strict=True)])

    def step(self, rows: Rows) -> int:
        """The number of assistant tokens in the step."""
        return sum(sum(self.masks[row]) for row in rows)

    def losses(self, model: nn.Module, rows: Rows, step: int) -> Losses:
        """Its share of the token mean over the step."""
        out = response_logprobs(model, [self.prompts[r] for r in rows], [self.targets[r] for r in rows])
        mask = torch.zeros_like(out.mask)
        for index, row in enumerate(rows):
            mask[index, : len(self.masks[row])] = torch.tensor(self.masks[row], device=mask.device)
        total = (mask / step * nll(out.logprobs)).sum()
        return Losses(total, {"loss/nll": float(total.detach())})

    def names(self, rows: Rows) -> list[str]:
        """Demonstrations by their number."""
        return [f"demonstration {row}" for row in rows]


def tokenized(conversations: list[Any], chat: Chat, limit: int) -> tuple[Imitation, int]:
    """Demonstrations as tokens and masks, and how many were longer than `limit`."""
    objective, too_long = Imitation([], [], []), 0
    for messages in conversations:
        tokens, mask = chat.demonstration(messages)
        if len(tokens) > limit:
            too_long += 1
            continue
        start = mask.index(True)
        objective.prompts.append(tokens[:start])
        objective.targets.append(tokens[start:])
        objective.masks.append(mask[start:])
    return objective, too_long


@stage(writes=POLICY, version=1, hardware="gpu")
def sft(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Imitate demonstrations; create the model first where none is given."""
    conversations = inputs.demonstrations.table(["messages"])["messages"].to_pylist()
    model, chat = _model(inputs, settings, conversations, out)
    objective, too_long = tokenized(conversations, chat, settings.tokens)
    out.stats["rejected"] = too_long
    out.metrics.add("rows/rejected", too_long, "rows")
    if not objective.targets:
        raise ContractError(
            f"all {too_long} demonstrations are longer than {settings.tokens} tokens", str(inputs.demonstrations.path),
            "raise scale.prompt_tokens or scale.response_tokens",
        )  # fmt: skip
    steps_per_epoch = max(1, round(len(objective.targets) / settings.batch))
    total = steps_per_epoch * settings.epochs
    plan = Plan(
        epochs=settings.epochs, minibatches=steps_per_epoch, micro_batch_tokens=settings.micro_batch_tokens,
        gradient_clip=settings.gradient_clip, seed=derive(settings.seed, "sft"),
    )  # fmt: skip
    schedule = cosine(round(settings.warmup_share * total), total, settings.final_share)
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay)
    out.stats["steps"] = fit(model, objective, optimizer, schedule, plan, out.metrics)
    checkpoint.save(model, chat.tokenizer, out.path)


def _model(inputs: Inputs, settings: Settings, conversations: list[Any], out: Outbox) -> tuple[nn.Module, Chat]:
    """The model to train and its way to talk; a new tokenizer is written to `out` to be read there."""
    if inputs.policy is not None:
        place = inputs.policy.path
        checkpoint.inspect(place)
        model = checkpoint.load_policy(place, "float32")
    elif settings.new is not None:
        place = out.path
        texts = (turn["content"] for messages in conversations for turn in messages)
        model, tokenizer = create(settings.new, texts, derive(settings.seed, "new model"))
        tokenizer.save_pretrained(place)
    else:
        raise ExperimentError(
            "no model to train", do="name one with --policy PATH, or describe it with --set new={...}"
        )
    return model.to(device()), Chat(place)


if __name__ == "__main__":
    sft.main()
