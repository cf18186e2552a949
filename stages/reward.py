"""rankings, policy or reward_model (, demonstrations) -> reward_model: the better response gets the higher score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import nn

from pipeline.algorithms.losses import reward_bias
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import DEMONSTRATIONS, POLICY, RANKINGS, REWARD_MODEL
from pipeline.errors import ContractError, ExperimentError
from pipeline.experiment import Experiment
from pipeline.models import adapters, checkpoint
from pipeline.models.distributed import shard
from pipeline.models.precision import computing
from pipeline.seeds import derive
from pipeline.stage import TrainingSettings, stage
from pipeline.text import Chat
from pipeline.training import batches
from pipeline.training.best import Best, Judged
from pipeline.training.comparisons import measures
from pipeline.training.loop import Plan, fit
from pipeline.training.optimizer import adamw, cosine
from pipeline.training.preference import Compared, Element, Preference, elements, scored
from pipeline.training.progress import Progress

PAIRS = "pairs.parquet"
"""Beside the model: every comparison that it was measured by, and what it said of it."""


class Settings(TrainingSettings):
    """How to learn from rankings."""

    epochs: int = Field(1, ge=1)
    """Passes over the rankings; more than one overfits (arXiv:2203.02155, section 3.5)."""
    batch: int = Field(64, ge=1)
    """Prompts per optimizer step, with all their rankings."""
    learning_rate: float = Field(9e-6, gt=0)
    """Peak of the schedule."""
    warmup_share: float = Field(0.0, ge=0, le=1)
    """Share of the steps over which the rate rises linearly."""
    final_share: float = Field(0.1, ge=0, le=1)
    """Cosine decay ends at this share of the peak."""
    margin: float = Field(0.0, ge=0)
    """The better response must lead by this times the difference of the ratings, where annotators gave ratings."""
    held_out_share: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts that are not trained on: they measure accuracy, and end the training early."""
    check_every: int = Field(0, ge=0)
    """Optimizer steps between two looks at the held-out prompts; the best weights seen are kept. 0: one look, at the
    end, and the last weights are kept."""
    patience: int = Field(3, ge=1)
    """Looks in a row without a better accuracy after which the training ends."""
    tokens: int = Field(1024, ge=1)
    """A ranking with a longer prompt and response is left out and counted, never cut; so is a demonstration."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`reward`, and lengths from `scale`."""
        scale = experiment.scale
        return {
            **experiment.reward.model_dump(), 
            "tokens": scale.prompt_tokens + scale.response_tokens,
            **cls.training(experiment),
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What people prefer, the model to start from, responses that are to score 0 on average, and a test."""

    rankings: Annotated[tuple[Artifact, ...], RANKINGS]
    policy: Annotated[Artifact | None, POLICY] = None
    reward_model: Annotated[Artifact | None, REWARD_MODEL] = None
    demonstrations: Annotated[Artifact | None, DEMONSTRATIONS] = None
    held_out: Annotated[Artifact | None, RANKINGS] = None
    """Rankings that only measure: nothing is trained or chosen by them."""


def usable(rankings: Sequence[Artifact], chat: Chat, limit: int, out: Outbox, name: str = "rankings") -> list[Element]:
    """What has a pair and no text of more than `limit` tokens, by prompt; rankings left out are counted."""
    rows = [row for artifact in rankings for row in artifact.table().to_pylist()]
    found, kept = elements(rows, chat), []
    left_out = {"repeated": len(rows) - sum(len(element.rankings) for element in found), "too_long": 0, "tie": 0}
    for element in found:
        fits = [len(element.prompt) + len(response) <= limit for response in element.responses]
        short = [one for one in element.rankings if all(fits[place] for place in one.places)]
        paired = [one for one in short if len(set(one.ranks)) > 1]
        left_out["too_long"] += len(element.rankings) - len(short)
        left_out["tie"] += len(short) - len(paired)
        if paired:
            kept.append(element.only(paired))
    for reason, count in left_out.items():
        out.metrics.add(f"rejected/{name}_{reason}", count, "rankings")
    out.stats["rejected"] = out.stats.get("rejected", 0) + sum(left_out.values())
    told = "{repeated} came before, {too_long} have more than {limit} tokens, {tie} have no pair"
    told = told.format(limit=limit, **left_out)
    if any(left_out.values()):
        out.say(f"{name} left out: {told}")
    if not kept:
        raise ContractError(
            f"none of the {name} can be used: {told}", ", ".join(str(artifact.path) for artifact in rankings),
            "raise scale.prompt_tokens or scale.response_tokens; or rank responses that differ",
        )  # fmt: skip
    return kept


def shown(demonstrations: Artifact, chat: Chat, limit: int, out: Outbox) -> list[Element]:
    """The last turn of each demonstration as a response, where it has at most `limit` tokens; others are counted."""
    conversations = demonstrations.table(["messages"])["messages"].to_pylist()
    texts = [
        Element(str(row), chat.prompt_tokens(m[:-1]), [chat.response_tokens(m[-1]["content"])])
        for row, m in enumerate(conversations)
    ]
    kept = [text for text in texts if text.tokens <= limit]
    out.metrics.add("rejected/demonstrations", len(texts) - len(kept), "rows")
    if not kept:
        raise ContractError(
            f"all {len(texts)} demonstrations are longer than {limit} tokens", str(demonstrations.path),
            "raise scale.prompt_tokens or scale.response_tokens",
        )  # fmt: skip
    return kept


def shift(model: Any, demonstrated: Sequence[Element], budget: int, out: Outbox) -> None:
    """Give the model the bias with which the demonstrations' mean score is 0 (arXiv:2203.02155, section 3.5)."""
    if demonstrated:
        model.config.reward_bias = 0.0
        model.config.reward_bias = float(reward_bias(torch.from_numpy(scored(model, demonstrated, budget))))
    else:
        out.say(f"no demonstrations: the bias stays {checkpoint.reward_bias(model):g}")
    out.metrics.add("reward/bias", checkpoint.reward_bias(model), "reward")


def refuse_leak(trained: Sequence[Element], test: Sequence[Element], where: Artifact) -> None:
    """Raise `ContractError` for prompts that are both trained on and in the test: its accuracy would mean nothing."""
    known = {element.prompt_id for element in trained}
    if shared := [element.prompt_id for element in test if element.prompt_id in known]:
        raise ContractError(
            f"{len(shared)} prompts of the held-out rankings are also trained on; first: {', '.join(shared[:5])}",
            str(where.path), "take them out of one of the two",
        )  # fmt: skip


def _model(inputs: Inputs, settings: Settings) -> tuple[Any, Chat, int]:
    """The model to train, its way to talk, and how many tokens it can read."""
    if inputs.policy is not None and inputs.reward_model is None:
        place = inputs.policy.path
        facts = checkpoint.inspect(place, "policy")
        model = checkpoint.fresh_reward_model(place, derive(settings.seed, "reward head"))
    elif inputs.reward_model is not None and inputs.policy is None:
        place = inputs.reward_model.path
        facts = checkpoint.inspect(place, "reward_model")
        model = checkpoint.load_reward_model(place, "float32")
    else:
        found = "neither is" if inputs.policy is None else "both are"
        raise ExperimentError(
            f"a reward model starts from a policy or from a reward model, and {found} given",
            do="name one of them, with --policy PATH or --reward-model PATH",
        )
    model = adapters.attached(model, settings.lora, derive(settings.seed, "adapters"))
    model = computing(model, settings.compute_dtype, settings.recompute)
    return shard(model), Chat(place), facts.max_position


@stage(writes=REWARD_MODEL, version=2, hardware="gpu", ranks=True)
def reward(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Learn to score responses from rankings; then let demonstrations score 0 on average."""
    model, chat, positions = _model(inputs, settings)
    limit = min(settings.tokens, positions)
    demonstrated = shown(inputs.demonstrations, chat, limit, out) if inputs.demonstrations is not None else []
    found = usable(inputs.rankings, chat, limit, out)
    test: list[Element] = []
    if inputs.held_out is not None:
        test = usable([inputs.held_out], chat, limit, out, "held_out_rankings")
        refuse_leak(found, test, inputs.held_out)
    out.metrics.add("rows/rejected", out.stats["rejected"], "rankings")
    kept_back = batches.held_out([element.prompt_id for element in found], settings.held_out_share, settings.seed)
    trained, held_out = list(compress(found, ~kept_back)), list(compress(found, kept_back))
    _train(model, trained, held_out, settings, out)
    shift(model, demonstrated, settings.micro_batch_tokens, out)
    _measure(model, {"train": trained, "held_out": held_out, "test": test}, settings, out)
    checkpoint.save(model, chat.tokenizer, out.path)


def _train(
    model: nn.Module, trained: Sequence[Element], held_out: Sequence[Element], settings: Settings, out: Outbox
) -> None:
    best = _best(model, held_out, settings, out) if settings.check_every else None
    steps_per_epoch = max(1, round(len(trained) / settings.batch))
    steps = batches.dealt(len(trained), settings.epochs, steps_per_epoch, derive(settings.seed, "reward"))
    plan = Plan(steps, settings.micro_batch_tokens, settings.gradient_clip, seed=settings.seed)
    schedule = cosine(round(settings.warmup_share * len(steps)), len(steps), settings.final_share)
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay, offload=settings.offload)
    objective = Preference(trained, settings.margin)
    progress = Progress(out, settings.save_every)
    taken = fit(model, objective, optimizer, schedule, plan, out.metrics, best, progress)
    read = np.concatenate(steps[:taken])
    pairs_per_token = Compared.of(trained).counts[read].sum() / objective.lengths[read].sum()
    speed = out.metrics.last()["speed/tokens_per_second"] * pairs_per_token
    out.metrics.add("speed/pairs_per_second", speed, "pairs/s")
    out.stats["steps"] = taken
    if best is not None:
        best.restore(taken)
        out.stats["steps_kept"] = best.step
        out.metrics.add("steps/kept", best.step, "steps")
        out.say(f"kept the weights of step {best.step} of {taken}: held-out accuracy {best.accuracy:.3f}")


def _best(model: nn.Module, held_out: Sequence[Element], settings: Settings, out: Outbox) -> Best:
    if not held_out:
        raise ExperimentError(
            f"reward.check_every = {settings.check_every} with no prompt held out to look at, "
            f"at reward.held_out_share = {settings.held_out_share:g}",
            do="set reward.held_out_share = 0.1 and give two prompts or more, or set reward.check_every = 0",
        )
    judge = partial(Judged.of, model, held_out, settings.micro_batch_tokens, settings.margin)
    return Best(model, judge, settings.check_every, settings.patience, out.metrics)


def _measure(model: nn.Module, sets: Mapping[str, Sequence[Element]], settings: Settings, out: Outbox) -> None:
    """Loss and accuracy on each set of prompts; everything else on the last that there is: test, held out, train."""
    for name, some in sets.items():
        out.metrics.add(f"rows/{name}", sum(len(element.rankings) for element in some), "rankings")
    made = {
        name: Judged.of(model, some, settings.micro_batch_tokens, settings.margin)
        for name, some in sets.items()
        if some
    }
    for name, judged in made.items():
        out.metrics.add(f"loss/{name}", judged.loss, "nat")
        known = {f"accuracy/{name}": judged.accuracy, f"accuracy/{name}_error": judged.error}
        for key, value in known.items():
            if np.isfinite(value):  # one prompt has no standard error
                out.metrics.add(key, value, "fraction")
                out.stats[key] = value
    *_, judged = made.values()
    numbers = measures(judged.comparisons, judged.scores, judged.lengths)
    every = np.concatenate([one.scores for one in made.values()])
    numbers |= {
        "reward_scores/mean": (float(every.mean()), "reward"), "reward_scores/std": (float(every.std()), "reward")
    }  # fmt: skip
    for key, (value, unit) in numbers.items():
        out.metrics.add(key, value, unit)
    out.stats |= {key: numbers[key][0] for key in ("calibration/error", "reward_scores/length_correlation")}
    pq.write_table(pa.table(judged.comparisons.columns()), out.path / PAIRS)


if __name__ == "__main__":
    reward.main()
