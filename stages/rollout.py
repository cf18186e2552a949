"""prompts, policy -> rollouts: an engine samples a group of responses to each prompt, shard by shard."""

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field, model_validator

from pipeline import ragged
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import POLICY, PROMPTS, ROLLOUTS
from pipeline.engines import (
    ENGINES,
    GREEDY,
    Completion,
    Engine,
    EngineOptions,
    Memory,
    Request,
    Sampling,
    check_beams,
    open_engine,
)
from pipeline.errors import ArtifactError, ContractError, EngineError
from pipeline.experiment import Experiment
from pipeline.journal import NOWHERE, Journal
from pipeline.metrics import console
from pipeline.models import checkpoint
from pipeline.seeds import derive
from pipeline.shards import elsewhere, spread
from pipeline.stage import StageSettings, stage
from pipeline.text import Chat
from pipeline.wellformed import malformed


def known_engine(name: str) -> str:
    """`name`, if an engine is called so: to be told before anything is trained for it."""
    if name not in ENGINES:
        raise ValueError(f"no engine is called {name!r}; there are: {', '.join(ENGINES)}")
    return name


FOR_DEVICES = ("tensor_parallel", "gpu_memory_utilization", "max_num_seqs")
"""Settings that an engine's options, a stage's settings and `resources` have by one name."""


class Settings(StageSettings):
    """Which prompts, and how to sample."""

    group_size: int = Field(ge=1)
    """Responses per prompt."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before the softmax."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share of the probability; 1 is all."""
    top_k: int | None = Field(None, ge=1)
    """Sample from so many of the likeliest tokens; all when absent."""
    greedy: bool = False
    """Also one greedy response per prompt, as sample -1."""
    beams: int | None = Field(None, ge=1)
    """Search with so many beams instead of sampling; the group is the best of them, the likeliest first."""
    prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are rejected and counted, never cut."""
    response_tokens: int = Field(1024, ge=1)
    """Longest response, its end token included; what is longer is cut and marked `length`."""
    first: int = Field(0, ge=0)
    """Where in the endless shuffled stream of prompts to start: the cursor."""
    since: int | None = Field(None, ge=0)
    """The cursor at the start of the iteration: a prompt drawn again since then is a group of its own."""
    count: int | None = Field(None, ge=1)
    """Prompts to take from the stream; every prompt once, in order, when absent."""
    shard: int = Field(256, ge=1)
    """Prompts per part. An interrupted run loses the groups that it had not finished."""
    engine: Annotated[str, AfterValidator(known_engine)] = "vllm"
    """Who samples: `vllm`, `transformers`, `scripted`."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Arithmetic of the engine; `auto` takes what the checkpoint names."""
    tensor_parallel: int = Field(1, ge=1)
    """Devices that share one engine's weights."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory for vLLM's weights and cache."""
    max_num_seqs: int = Field(512, ge=1)
    """Responses in flight at once."""
    seed: int = 0
    """Of the run."""
    draw: str = "0"
    """Sets this sampling apart from others of the run: `iteration/round`, `eval/iteration`."""
    staleness: int | None = Field(None, ge=0)
    """Updates between this policy and the one that is to learn, for the rows to say; they do not when absent."""

    @model_validator(mode="after")
    def _beams_fit(self) -> Self:
        check_beams(self)
        return self

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`recipe.rollout`, lengths from `scale`, the engine from `resources`."""
        plan, scale, resources = experiment.recipe.rollout, experiment.scale, experiment.resources
        return {
            "group_size": plan.group_size, "temperature": plan.temperature, "top_p": plan.top_p, "top_k": plan.top_k,
            "greedy": plan.greedy, "prompt_tokens": scale.prompt_tokens, "response_tokens": scale.response_tokens,
            "engine": resources.engine, "seed": experiment.seed,
            **{name: getattr(resources, name) for name in ("dtype", *FOR_DEVICES)},
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Whom to ask, and what."""

    prompts: Annotated[Artifact, PROMPTS]
    policy: Annotated[Artifact, POLICY]


@dataclass(frozen=True)
class Asked:
    """One prompt of this sampling."""

    prompt_id: str
    tokens: list[int]
    seed: int


def stream(size: int, first: int, count: int, seed: int) -> list[int]:
    """Rows `first` .. `first + count` of an endless stream: the prompts in a new order each epoch.

    Every prompt is drawn once before any is drawn again.
    """
    epochs: dict[int, np.ndarray] = {}
    rows = []
    for position in range(first, first + count):
        epoch, place = divmod(position, size)
        if epoch not in epochs:
            epochs[epoch] = np.random.default_rng(derive(seed, "prompts", epoch)).permutation(size)
        rows.append(int(epochs[epoch][place]))
    return rows


def occurrences(prompt_ids: Sequence[str]) -> list[str]:
    """The ids, with `#1`, `#2`, ... on later draws of the same prompt: two draws are two groups."""
    seen: dict[str, int] = {}
    names = []
    for prompt_id in prompt_ids:
        times = seen.get(prompt_id, 0)
        seen[prompt_id] = times + 1
        names.append(prompt_id if times == 0 else f"{prompt_id}#{times}")
    return names


def short_enough(tokens: Sequence[list[int]], limit: int) -> list[int]:
    """Indices of the prompts of at most `limit` tokens."""
    return [index for index, prompt in enumerate(tokens) if len(prompt) <= limit]


_tokenized: dict[tuple[str, str, str], list[list[int]]] = {}


def tokenized(prompts: Artifact, chat: Chat) -> list[list[int]]:
    """Tokens of every prompt; kept for the next iteration, which asks the same ones with the same tokenizer."""
    about = chat.metadata()
    key = (prompts.manifest.digest, about["tokenizer_digest"], about["chat_template_digest"])
    if key not in _tokenized:
        _tokenized.clear()
        _tokenized[key] = [chat.prompt_tokens(turns) for turns in prompts.table(["messages"])["messages"].to_pylist()]
    return _tokenized[key]


def questions(ids: Sequence[str], tokens: Sequence[list[int]], settings: Settings) -> tuple[list[Asked], int]:
    """The prompts to ask, and how many prompts of the whole dataset are too long to ever be asked.

    Too long prompts leave before the stream is drawn, so a count is a count of prompts that are answered.
    """
    usable = short_enough(tokens, settings.prompt_tokens)
    if not usable:
        raise ContractError(
            f"all {len(ids)} prompts are longer than {settings.prompt_tokens} tokens", do="raise scale.prompt_tokens"
        )
    since = settings.first if settings.since is None else settings.since
    places = list(range(len(usable)))
    if settings.count is not None:
        places = stream(len(usable), since, settings.first - since + settings.count, settings.seed)
    named = occurrences([ids[usable[place]] for place in places])
    fresh = slice(settings.first - since, None) if settings.count is not None else slice(None)
    asked = [
        Asked(name, tokens[usable[place]], derive(settings.seed, "rollout", settings.draw, name) >> 1)
        for name, place in zip(named[fresh], places[fresh], strict=True)
    ]
    return asked, len(ids) - len(usable)


def refuse_foreign(tokens: Sequence[Sequence[int]], stop_ids: Sequence[int], vocab_size: int, policy: Path) -> None:
    """Raise `ArtifactError` where the policy's tokenizer writes, or ends with, tokens that its weights do not know."""
    largest = max(max(map(max, filter(None, tokens)), default=0), *stop_ids)
    if largest >= vocab_size:
        raise ArtifactError(
            f"the tokenizer is another model's: it uses token id {largest}, and the weights know {vocab_size} tokens",
            str(policy),
            "copy the tokenizer's files from where the weights come from, or name another policy",
        )


def whole_groups(
    asked: Sequence[Asked], completions: Iterable[Completion], plan: Sampling, done: Collection[int] = ()
) -> Iterator[tuple[int, list[Completion]]]:
    """Place of a prompt and its responses, samples in order, as soon as all of them are there.

    Raises `EngineError` in the end when a group is not complete that is not among the `done`.
    """
    waiting: dict[int, dict[int, Completion]] = {place: {} for place in range(len(asked)) if place not in done}
    for completion in completions:
        group = waiting[completion.prompt]
        group[completion.sample] = completion
        if group.keys() == set(plan.samples):
            del waiting[completion.prompt]
            yield completion.prompt, [group[sample] for sample in plan.samples]
    for place, group in waiting.items():
        raise EngineError(f"{len(group)} of {len(plan.samples)} responses", f"prompt {asked[place].prompt_id}")


class Shard(NamedTuple):
    """Prompts of a part: all of them, or a piece."""

    part: int
    asked: Sequence[Asked]
    after: "Shard | None" = None
    """What comes next: the engine may begin with it while it samples the last responses of this one."""


class Sampled(NamedTuple):
    """What was sampled for a shard, and what it took."""

    table: pa.Table
    """Rows of the rollouts contract, groups in the order asked, samples in order."""
    tokens: int
    """Sampled now: those of groups that a journal had not."""


@dataclass
class Sampler:
    """Asks an engine for the groups that are not there yet."""

    policy: Path
    name: str
    """Of the engine."""
    options: EngineOptions
    plan: Sampling
    about: Mapping[str, str]
    """What the rows' log-probabilities mean."""
    journals: Path | None
    """Where finished groups are kept; None: nowhere, a shard is done again from its beginning."""
    memory: Memory | None = None
    """What the engine's going to sleep here freed, once it has and where it knows."""

    @cached_property
    def engine(self) -> Engine:
        """The engine, with the policy's weights."""
        return open_engine(self.name, self.policy, self.options)

    @cached_property
    def chat(self) -> Chat:
        """The policy's tokenizer."""
        return Chat(self.policy)

    def cut(self, part: Shard) -> list[Shard]:
        """The part in shards that each fill an engine once."""
        prompts = -(-self.options.max_num_seqs // len(self.plan.samples))
        starts = range(0, len(part.asked), prompts)
        return [Shard(part.part, part.asked[start : start + prompts]) for start in starts]

    def __call__(self, shard: Shard) -> Sampled:
        """Sample a shard.

        Groups that the journal has are taken from it; the others are added to it as they are finished.
        """
        about = {**self.engine.describe(), **self.chat.metadata(), **self.about}
        then = None if shard.after is None else _request(shard.after.asked, self._kept(shard.after, about))
        with Journal(self._journal(shard), under=about) as journal:
            table, tokens = self._rows(shard.asked, journal, then)
        return Sampled(table.replace_schema_metadata({**(table.schema.metadata or {}), **about}), tokens)

    def rest(self) -> None:
        """Give the accelerator's memory back."""
        if "engine" in vars(self) and not self.engine.closed:
            self.memory = self.engine.sleep()

    def _journal(self, shard: Shard) -> Path:
        return NOWHERE if self.journals is None else journal_of(self.journals, shard.part)

    def _kept(self, shard: Shard, about: Mapping[str, str]) -> Collection[int]:
        """Places of the groups that a journal has, if there is one."""
        if not (file := self._journal(shard)).exists():
            return ()
        with Journal(file, under=about) as journal:
            return _groups(shard.asked, journal).keys()

    def _rows(self, asked: Sequence[Asked], journal: Journal, then: Request | None) -> Sampled:
        groups = _groups(asked, journal)
        try:
            new = dict(self._sampled(asked, journal, groups.keys(), then))
        except BaseException:
            self.engine.close()  # it may be in the middle of a request: the next try builds another
            raise
        groups |= new
        rows = [_row(one, said, self.chat) for place, one in enumerate(asked) for said in groups[place]]
        tokens = sum(len(said.tokens) for group in new.values() for said in group)
        return Sampled(pa.Table.from_pylist(rows, schema=ROLLOUTS.schema(rows[0])), tokens)

    def _sampled(
        self, asked: Sequence[Asked], journal: Journal, done: Collection[int], then: Request | None
    ) -> Iterator[tuple[int, list[Completion]]]:
        completions = self.engine.generate(_request(asked, done), self.plan, then)
        for place, group in whole_groups(asked, completions, self.plan, done):
            fields = [[one.sample, one.tokens, one.logprobs, one.finish, one.seed] for one in group]
            journal.add([asked[place].prompt_id, fields])
            yield place, group


def journal_of(folder: Path, index: int) -> Path:
    """Where finished groups of a part are kept until the part is written."""
    return folder / f"groups-{index:05d}.jsonl"


def _request(asked: Sequence[Asked], done: Collection[int]) -> Request:
    return Request([one.tokens for one in asked], [one.seed for one in asked], frozenset(done))


def _groups(asked: Sequence[Asked], journal: Journal) -> dict[int, list[Completion]]:
    """What a journal has: place of a prompt -> its responses."""
    places = {one.prompt_id: place for place, one in enumerate(asked)}
    return {
        places[prompt_id]: [Completion(places[prompt_id], *fields) for fields in group]
        for prompt_id, group in journal.entries()
    }


def _row(asked: Asked, completion: Completion, chat: Chat) -> dict[str, Any]:
    return {
        "prompt_id": asked.prompt_id, "sample": completion.sample, "prompt_tokens": asked.tokens,
        "response_tokens": completion.tokens, "response": chat.decode(completion.tokens),
        "sampler_logprobs": completion.logprobs, "finish": completion.finish, "seed": completion.seed,
    }  # fmt: skip


@stage(writes=ROLLOUTS, version=2, hardware="gpu", shards=True)
def rollout(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Sample responses from the policy."""
    facts, longest = checkpoint.inspect(inputs.policy.path), settings.prompt_tokens + settings.response_tokens
    if longest > facts.max_position:
        raise ArtifactError(
            f"prompt_tokens + response_tokens = {longest} is more than the policy's {facts.max_position} positions",
            str(inputs.policy.path),
            "lower scale.prompt_tokens or scale.response_tokens",
        )
    chat = Chat(inputs.policy.path)
    ids = inputs.prompts.table(["prompt_id"])["prompt_id"].to_pylist()
    tokens = tokenized(inputs.prompts, chat)
    refuse_foreign(tokens, chat.stop_ids, facts.vocab_size, inputs.policy.path)
    asked, too_long = questions(ids, tokens, settings)
    if too_long:
        out.log(f"{too_long} prompts are longer than {settings.prompt_tokens} tokens and are not asked")
    plan = Sampling(
        group_size=settings.group_size, temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k,
        max_tokens=settings.response_tokens, stop_ids=chat.stop_ids, greedy=settings.greedy,
        beams=settings.beams,
    )  # fmt: skip
    parts = [asked[start : start + settings.shard] for start in range(0, len(asked), settings.shard)]
    sampler = Sampler(
        inputs.policy.path, settings.engine, _options(settings, longest), plan,
        _distribution(settings, inputs.policy), None if elsewhere() else out.working,
    )  # fmt: skip
    missing, new, started = list(out.shards(len(parts))), 0, time.monotonic()

    def left() -> Iterator[Shard]:
        for index, following in zip_longest(missing, missing[1:]):
            console.progress(f"sampling part {index + 1}/{len(parts)}")
            yield Shard(index, parts[index], None if following is None else Shard(following, parts[following]))

    for index, made in zip(missing, spread(sampler, left(), sampler.cut, [inputs.policy.path]), strict=True):
        out.write(index, _dated(pa.concat_tables([one.table for one in made]), settings.staleness))
        journal_of(out.working, index).unlink(missing_ok=True)
        new += sum(one.tokens for one in made)
    if new:
        out.metrics.add("speed/tokens_per_second", new / (time.monotonic() - started), "tokens/s")
    _remember(out, sampler.memory)
    _measure(out, too_long, settings.first + len(asked))


def _remember(out: Outbox, memory: Memory | None) -> None:
    """What the engine's devices held while it was awake, and what of that its sleep leaves to those who train."""
    if memory is None:
        return
    out.metrics.add("memory/engine_awake", memory.awake, "GB")
    out.metrics.add("memory/engine_asleep", memory.asleep, "GB")
    out.log(f"engine asleep: {memory.awake:.1f} -> {memory.asleep:.1f} GB in use on its devices")


def _options(settings: Settings, longest: int) -> EngineOptions:
    chosen = {name: getattr(settings, name) for name in FOR_DEVICES}
    return EngineOptions(dtype=settings.dtype, max_model_len=longest, **chosen)


def _dated(table: pa.Table, staleness: int | None) -> pa.Table:
    if staleness is None:
        return table
    return table.append_column("staleness", pa.array([staleness] * table.num_rows, pa.int32()))


def _distribution(settings: Settings, policy: Artifact) -> dict[str, str]:
    """What `sampler_logprobs` mean, for the file's metadata."""
    named = ("temperature", "top_p", "top_k", "beams")
    return {**{name: str(getattr(settings, name)) for name in named}, "policy_digest": policy.manifest.digest}


def repeated(part: pa.Table) -> list[float]:
    """Of each group with more than one sampled response: (responses - different ones) / (responses - 1)."""
    tokens = part["response_tokens"].combine_chunks()
    flat, ends = tokens.flatten().to_numpy(), np.cumsum(ragged.lengths(tokens))
    groups: defaultdict[str, list[bytes]] = defaultdict(list)
    keys = zip(part["prompt_id"].to_pylist(), part["sample"].to_pylist(), strict=True)
    for (prompt_id, sample), response in zip(keys, np.split(flat, ends[:-1]), strict=True):
        if sample != GREEDY:
            groups[prompt_id].append(response.tobytes())
    return [(len(group) - len(set(group))) / (len(group) - 1) for group in groups.values() if len(group) > 1]


def _measure(out: Outbox, rejected: int, cursor: int) -> None:
    """Lengths, cuts, repetitions and misfits over all parts."""
    lengths, again, cut, bad = [], [], 0, 0
    for part in out.parts(["prompt_id", "sample", "response_tokens", "sampler_logprobs", "finish"]):
        lengths.append(ragged.lengths(part["response_tokens"]))
        again += repeated(part)
        cut += pc.sum(pc.equal(part["finish"], "length")).as_py()
        bad += int(malformed(part).sum())
    tokens = np.concatenate(lengths)
    numbers = {
        "length/mean": (float(tokens.mean()), "tokens"), "length/max": (float(tokens.max()), "tokens"),
        "length/cut": (cut / len(tokens), "fraction"), "rows/malformed": (float(bad), "responses"),
    }  # fmt: skip
    if again:
        numbers["duplicates/in_group"] = (float(np.mean(again)), "fraction")
    for name, (value, unit) in numbers.items():
        out.metrics.add(name, value, unit)
    out.metrics.add("rows/rejected", rejected, "prompts")
    out.stats |= {name: value for name, (value, _) in numbers.items()}
    out.stats |= {"rejected": rejected, "tokens": int(tokens.sum()), "cursor": cursor}


if __name__ == "__main__":
    rollout.main()
