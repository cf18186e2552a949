"""demonstrations (, policy, documents) -> policy: likelihood of the assistant's tokens; a new model if none given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from torch import nn

from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import DEMONSTRATIONS, DOCUMENTS, POLICY
from pipeline.errors import ContractError, ExperimentError
from pipeline.experiment import Experiment
from pipeline.models import adapters, checkpoint
from pipeline.models.distributed import shard
from pipeline.models.fresh import ModelSpec, create
from pipeline.models.precision import computing
from pipeline.seeds import derive
from pipeline.stage import TrainingSettings, stage
from pipeline.text import Chat
from pipeline.training import batches
from pipeline.training.batches import Rows
from pipeline.training.imitation import Example, Imitation, windows
from pipeline.training.loop import Plan, fit
from pipeline.training.optimizer import adamw, cosine
from pipeline.training.progress import Progress


class Settings(TrainingSettings):
    """How to imitate."""

    new: ModelSpec | None = None
    """Shape and tokenizer of the model to create; used when no `--policy` is given."""
    epochs: int = Field(1, ge=1)
    """Passes over the demonstrations."""
    batch: int = Field(64, ge=1)
    """Examples per optimizer step."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak of the schedule."""
    warmup_share: float = Field(0.03, ge=0, le=1)
    """Share of the steps over which the rate rises linearly."""
    final_share: float = Field(0.1, ge=0, le=1)
    """Cosine decay ends at this share of the peak."""
    documents_share: float = Field(0.0, ge=0, lt=1)
    """Share of an epoch's examples that are windows of documents; 0.1 in InstructGPT (arXiv:2203.02155, app. C.3)."""
    tokens: int = Field(1024, ge=1)
    """Longer demonstrations are left out and counted, never cut; longer documents are cut into windows."""

    @model_validator(mode="after")
    def _long_enough(self) -> Self:
        if self.new is not None and self.new.max_position < self.tokens:
            raise ValueError(f"new.max_position = {self.new.max_position} is less than tokens = {self.tokens}")
        return self

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`sft`, `models.new`, and lengths from `scale`."""
        sft, models, scale = experiment.sft, experiment.models, experiment.scale
        return {
            **sft.model_dump(exclude={"enabled"}), "new": models.new if models.policy is None else None,
            "tokens": sft.tokens or scale.prompt_tokens + scale.response_tokens,
            **cls.training(experiment),
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What to imitate, the model to start from, and plain text to mix in."""

    demonstrations: Annotated[Artifact, DEMONSTRATIONS]
    policy: Annotated[Artifact | None, POLICY] = None
    documents: Annotated[Artifact | None, DOCUMENTS] = None


def tokenized(conversations: list[Any], chat: Chat, limit: int) -> tuple[list[Example], int]:
    """Demonstrations as examples whose assistant tokens are imitated, and how many were longer than `limit`."""
    examples: list[Example] = []
    too_long = 0
    for messages in conversations:
        tokens, mask = chat.demonstration(messages)
        if len(tokens) > limit:
            too_long += 1
            continue
        start = mask.index(True)
        examples.append(Example(f"demonstration {len(examples)}", tokens[:start], tokens[start:], mask[start:]))
    return examples, too_long


def documents_per_epoch(demonstrations: int, share: float) -> int:
    """How many documents are a share of all examples: d / (demonstrations + d) = share, rounded."""
    return round(demonstrations * share / (1 - share))


def mixed(demonstrations: int, documents: int, settings: Settings) -> list[Rows]:
    """The rows of every optimizer step; rows from `demonstrations` on are windows of `documents`.

    Every epoch has all demonstrations, and the next windows of an endless stream that is reshuffled at each pass.
    """
    extra = documents_per_epoch(demonstrations, settings.documents_share)
    examples = demonstrations + extra
    steps = max(1, round(examples / settings.batch))
    plan = batches.dealt(examples, settings.epochs, steps, derive(settings.seed, "sft"))
    if not extra:
        return plan
    stream = batches.drawn(documents, 0, extra * settings.epochs, derive(settings.seed, "sft documents"))
    for index, rows in enumerate(plan):
        drawn = rows >= demonstrations
        rows[drawn] = demonstrations + stream[index // steps * extra + rows[drawn] - demonstrations]
    return plan


@stage(writes=POLICY, version=1, hardware="gpu", ranks=True)
def sft(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Imitate demonstrations; create the model first where none is given."""
    conversations = inputs.demonstrations.table(["messages"])["messages"].to_pylist()
    model, chat = _model(inputs, settings, conversations, out)
    demonstrations, too_long = tokenized(conversations, chat, settings.tokens)
    out.stats["rejected"] = too_long
    out.metrics.add("rows/rejected", too_long, "rows")
    if not demonstrations:
        raise ContractError(
            f"all {too_long} demonstrations are longer than {settings.tokens} tokens", str(inputs.demonstrations.path),
            "raise scale.prompt_tokens or scale.response_tokens",
        )  # fmt: skip
    documents = _documents(inputs, settings, chat)
    steps = mixed(len(demonstrations), len(documents), settings)
    taken = sum(int((rows >= len(demonstrations)).sum()) for rows in steps)
    out.metrics.add("rows/documents", taken, "rows")
    plan = Plan(steps, settings.micro_batch_tokens, settings.gradient_clip, seed=settings.seed)
    schedule = cosine(round(settings.warmup_share * len(steps)), len(steps), settings.final_share)
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay, offload=settings.offload)
    objective = Imitation([*demonstrations, *documents])
    progress = Progress(out, settings.save_every)
    out.stats["steps"] = fit(model, objective, optimizer, schedule, plan, out.metrics, progress=progress)
    checkpoint.save(model, chat.tokenizer, out.path)


def _documents(inputs: Inputs, settings: Settings, chat: Chat) -> list[Example]:
    """The windows to mix in; none where their share is 0."""
    if not settings.documents_share:
        return []
    if inputs.documents is None:
        raise ExperimentError(
            f"documents_share = {settings.documents_share}, and there are no documents",
            do="name some in the experiment as data.documents, or here with --documents PATH",
        )
    return windows(inputs.documents.table(["document_id", "text"]).to_pylist(), chat, settings.tokens)


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
    model = adapters.attached(model, settings.lora, derive(settings.seed, "adapters"))
    return shard(computing(model, settings.compute_dtype, settings.recompute)), Chat(place)


if __name__ == "__main__":
    sft.main()
