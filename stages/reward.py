"""rankings, policy or reward_model (, demonstrations) -> reward_model: the better response gets the higher score."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from pipeline import ragged
from pipeline.algorithms.losses import pairs, ranking, reward_bias
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import DEMONSTRATIONS, POLICY, RANKINGS, REWARD_MODEL
from pipeline.errors import ContractError, ExperimentError
from pipeline.experiment import Experiment
from pipeline.models import checkpoint
from pipeline.models.device import device
from pipeline.models.forward import response_scores
from pipeline.seeds import derive
from pipeline.stage import StageSettings, stage
from pipeline.text import Chat
from pipeline.training import batches
from pipeline.training.batches import Rows
from pipeline.training.loop import Losses, Plan, fit
from pipeline.training.optimizer import adamw, cosine


class Settings(StageSettings):
    """How to learn from rankings."""

    epochs: int = Field(1, ge=1)
    """Passes over the rankings; more than one overfits (arXiv:2203.02155, section 3.5)."""
    batch: int = Field(64, ge=1)
    """Rankings per optimizer step."""
    learning_rate: float = Field(9e-6, gt=0)
    """Peak of the schedule."""
    warmup_share: float = Field(0.0, ge=0, le=1)
    """Share of the steps over which the rate rises linearly."""
    final_share: float = Field(0.1, ge=0, le=1)
    """Cosine decay ends at this share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, of all matrices."""
    held_out_share: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts that are not trained on and measure accuracy."""
    gradient_clip: float = Field(1.0, gt=0)
    """Longest gradient; a longer one is scaled down to it."""
    tokens: int = Field(1024, ge=1)
    """A ranking with a longer prompt and response is left out and counted, never cut; so is a demonstration."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens that fit into memory at once; a ranking is never divided."""
    seed: int = 0
    """Of the run: a new head, the order of the rankings and what is held out follow from it."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`reward`, and lengths from `scale`."""
        scale = experiment.scale
        return {
            **experiment.reward.model_dump(), "gradient_clip": scale.gradient_clip, "seed": experiment.seed,
            "tokens": scale.prompt_tokens + scale.response_tokens,
            "micro_batch_tokens": experiment.resources.micro_batch_tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What people prefer, the model to start from, and responses that are to score 0 on average."""

    rankings: Annotated[Artifact, RANKINGS]
    policy: Annotated[Artifact | None, POLICY] = None
    reward_model: Annotated[Artifact | None, REWARD_MODEL] = None
    demonstrations: Annotated[Artifact | None, DEMONSTRATIONS] = None


class Text(NamedTuple):
    """A prompt and a response to it."""

    prompt: list[int]
    response: list[int]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Ranked:
    """One ranking as tokens."""

    name: str
    prompt_id: str
    """Without the mark of a second draw."""
    texts: list[Text]
    ranks: list[int]


@dataclass(frozen=True)
class Preference:
    """The objective: the mean over an optimizer step's rankings of the loss over each ranking's pairs.

    Every response is read once, whatever the number of pairs it is in (arXiv:2203.02155, section 3.5).
    """

    rankings: Sequence[Ranked]
    """Each has a pair."""

    @cached_property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens per ranking: of its responses, padded to the longest of them."""
        return np.array([len(r.texts) * max(text.length for text in r.texts) for r in self.rankings], dtype=np.int64)

    def step(self, rows: Rows) -> int:
        """The number of rankings in the step."""
        return len(rows)

    def losses(self, model: nn.Module, rows: Rows, step: int) -> Losses:
        """Its share of the mean over the step."""
        chosen = [self.rankings[row] for row in rows]
        texts = [text for ranked in chosen for text in ranked.texts]
        ranks, mask = compared(chosen, device())
        scores = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, _scores(model, texts))
        losses = ranking(scores, ranks, mask) / step
        total = losses.sum()
        right = accuracies(scores.detach(), ranks, mask).sum() / step
        return Losses(total, {"loss/ranking": float(total.detach()), "accuracy/pairs": float(right)})

    def names(self, rows: Rows) -> list[str]:
        """Rankings by their id."""
        return [self.rankings[row].name for row in rows]


def compared(
    rankings: Sequence[Ranked], place: torch.device | None = None
) -> tuple[Int[Tensor, "N K"], Bool[Tensor, "N K"]]:
    """Ranks of the responses of N rankings, padded to the longest of them, and where there is a response."""
    counts = np.array([len(ranked.ranks) for ranked in rankings], dtype=np.int64)
    mask = torch.from_numpy(ragged.mask_of(counts))
    flat = torch.tensor([rank for ranked in rankings for rank in ranked.ranks])
    ranks = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, flat)
    return ranks.to(place), mask.to(place)


def accuracies(
    scores: Float[Tensor, "N K"], ranks: Int[Tensor, "N K"], mask: Bool[Tensor, "N K"]
) -> Float[Tensor, " N"]:
    """Share of each ranking's pairs whose better response has the higher score; equal scores are half right."""
    chosen = pairs(ranks, mask)
    lead = (scores[:, :, None] - scores[:, None, :]).sign()
    return torch.where(chosen, (lead + 1) / 2, 0).sum(dim=(1, 2)) / chosen.sum(dim=(1, 2)).clamp(min=1)


def tokenized(rankings: Artifact, chat: Chat) -> Iterator[Ranked]:
    """Every ranking as tokens. A response ends with the end token, here as when it is scored."""
    columns = ["ranking_id", "prompt_id", "messages", "responses", "ranks"]
    for row in rankings.table(columns).to_pylist():
        prompt = chat.prompt_tokens(row["messages"])
        texts = [Text(prompt, chat.response_tokens(response)) for response in row["responses"]]
        yield Ranked(row["ranking_id"], row["prompt_id"].partition("#")[0], texts, row["ranks"])


def usable(rankings: Iterator[Ranked], limit: int, out: Outbox) -> list[Ranked]:
    """Those that have a pair and no text of more than `limit` tokens; the others are counted."""
    kept, too_long, tied = [], 0, 0
    for ranked in rankings:
        if max(text.length for text in ranked.texts) > limit:
            too_long += 1
        elif len(set(ranked.ranks)) == 1:
            tied += 1
        else:
            kept.append(ranked)
    out.stats["rejected"] = too_long + tied
    out.metrics.add("rejected/too_long", too_long, "rankings")
    out.metrics.add("rejected/tie", tied, "rankings")
    out.metrics.add("rows/rejected", too_long + tied, "rankings")
    if too_long + tied:
        out.say(f"rankings left out: {too_long} with more than {limit} tokens, {tied} without a pair")
    if not kept:
        raise ContractError(
            f"no ranking to learn from: {too_long} have more than {limit} tokens, {tied} have no pair",
            do="raise scale.prompt_tokens or scale.response_tokens; or rank responses that differ",
        )
    return kept


def scored(model: nn.Module, texts: Sequence[Text], budget: int) -> Float[np.ndarray, " B"]:
    """What the reward model says of texts, `budget` padded tokens of them at a time."""
    scores = np.zeros(len(texts))
    lengths = np.array([text.length for text in texts], dtype=np.int64)
    with torch.no_grad():
        for rows in batches.micro_batches(np.arange(len(texts)), lengths, budget):
            scores[rows] = _scores(model, [texts[row] for row in rows]).double().cpu().numpy()
    return scores


def _scores(model: nn.Module, texts: Sequence[Text]) -> Float[Tensor, " B"]:
    return response_scores(model, [text.prompt for text in texts], [text.response for text in texts])


@dataclass(frozen=True)
class Judged:
    """What the trained model says of some rankings."""

    loss: float
    """Mean over rankings."""
    accuracy: float
    """Share of all pairs whose better response has the higher score."""
    scores: Float[np.ndarray, " B"]
    """Of the responses of all rankings, one after the other."""

    @classmethod
    def of(cls, model: nn.Module, rankings: Sequence[Ranked], budget: int) -> Self:
        """Read every response once."""
        flat = scored(model, [text for ranked in rankings for text in ranked.texts], budget)
        ranks, mask = compared(rankings)
        scores = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, torch.from_numpy(flat))
        counts = pairs(ranks, mask).sum(dim=(1, 2))
        right = (accuracies(scores, ranks, mask) * counts).sum() / counts.sum()
        return cls(float(ranking(scores, ranks, mask).mean()), float(right), flat)


def shown(demonstrations: Artifact, chat: Chat, limit: int, out: Outbox) -> list[Text]:
    """The last turn of each demonstration as a response, where it has at most `limit` tokens; others are counted."""
    conversations = demonstrations.table(["messages"])["messages"].to_pylist()
    texts = [Text(chat.prompt_tokens(m[:-1]), chat.response_tokens(m[-1]["content"])) for m in conversations]
    kept = [text for text in texts if text.length <= limit]
    out.metrics.add("rejected/demonstrations", len(texts) - len(kept), "rows")
    if not kept:
        raise ContractError(
            f"all {len(texts)} demonstrations are longer than {limit} tokens", str(demonstrations.path),
            "raise scale.prompt_tokens or scale.response_tokens",
        )  # fmt: skip
    return kept


def shift(model: Any, demonstrated: Sequence[Text], budget: int, out: Outbox) -> None:
    """Give the model the bias with which the demonstrations' mean score is 0 (arXiv:2203.02155, section 3.5)."""
    if demonstrated:
        model.config.reward_bias = 0.0
        model.config.reward_bias = float(reward_bias(torch.from_numpy(scored(model, demonstrated, budget))))
    else:
        out.say(f"no demonstrations: the bias stays {checkpoint.reward_bias(model):g}")
    out.metrics.add("reward/bias", checkpoint.reward_bias(model), "reward")


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
    return model.to(device()), Chat(place), facts.max_position


@stage(writes=REWARD_MODEL, version=1, hardware="gpu")
def reward(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Learn to score responses from rankings; then let demonstrations score 0 on average."""
    model, chat, positions = _model(inputs, settings)
    limit = min(settings.tokens, positions)
    demonstrated = shown(inputs.demonstrations, chat, limit, out) if inputs.demonstrations is not None else []
    rankings = usable(tokenized(inputs.rankings, chat), limit, out)
    kept_back = batches.held_out([ranked.prompt_id for ranked in rankings], settings.held_out_share, settings.seed)
    trained, held_out = list(compress(rankings, ~kept_back)), list(compress(rankings, kept_back))
    objective = Preference(trained)
    steps_per_epoch = max(1, round(len(trained) / settings.batch))
    steps = batches.dealt(len(trained), settings.epochs, steps_per_epoch, derive(settings.seed, "reward"))
    plan = Plan(steps, settings.micro_batch_tokens, settings.gradient_clip)
    schedule = cosine(round(settings.warmup_share * len(steps)), len(steps), settings.final_share)
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay)
    out.stats["steps"] = fit(model, objective, optimizer, schedule, plan, out.metrics)
    shift(model, demonstrated, settings.micro_batch_tokens, out)
    _measure(model, trained, held_out, settings, out)
    checkpoint.save(model, chat.tokenizer, out.path)


def _measure(
    model: nn.Module, trained: Sequence[Ranked], held_out: Sequence[Ranked], settings: Settings, out: Outbox
) -> None:
    """Loss and accuracy of the finished model, and whether it prefers the longer response."""
    scores, lengths = [], []
    for name, rankings in (("train", trained), ("held_out", held_out)):
        out.metrics.add(f"rows/{name}", len(rankings), "rankings")
        if not rankings:
            continue
        found = Judged.of(model, rankings, settings.micro_batch_tokens)
        out.metrics.add(f"accuracy/{name}", found.accuracy, "fraction")
        out.metrics.add(f"loss/{name}", found.loss, "nat")
        out.stats[f"accuracy/{name}"] = found.accuracy
        scores.append(found.scores)
        lengths += [len(text.response) for ranked in rankings for text in ranked.texts]
    every = np.concatenate(scores)
    out.metrics.add("reward_scores/mean", float(every.mean()), "reward")
    out.metrics.add("reward_scores/std", float(every.std()), "reward")
    if every.std() > 0 and np.std(lengths) > 0:
        out.metrics.add("reward_scores/length_correlation", float(np.corrcoef(every, lengths)[0, 1]))


if __name__ == "__main__":
    reward.main()
