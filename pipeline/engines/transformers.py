"""The reference engine: a plain sampling loop over a Hugging Face model, exact and everywhere.

A response depends on its prompt, its seed and the weights, and not on what it is batched with: its uniform numbers
are drawn up front from its own generator, and a token is where the cumulated probabilities pass the next of them.
Beams are searched as `beams.py` says.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.building import built
from pipeline.engines import (
    GREEDY,
    Completion,
    EngineOptions,
    Sampling,
    check_request,
    ensure_open,
    fatal,
    response_seed,
)
from pipeline.engines.beams import BeamSearch, Next
from pipeline.engines.reading import Reader
from pipeline.errors import EngineError
from pipeline.packing import rounded


class TransformersEngine:
    """Samples with `AutoModelForCausalLM`, on a GPU where there is one."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.closed = False
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = None

    def load(self, checkpoint: Path) -> None:
        """Read the weights; refuse a checkpoint that leaves any of the model's tensors unset."""
        ensure_open(self)
        with fatal(self, "loading the checkpoint", checkpoint):
            self._model = None
            model, missing = built(AutoModelForCausalLM, checkpoint, _dtype(self.options.dtype))
            if missing:
                raise EngineError(f"no tensor for {sorted(missing)}", where=str(checkpoint))
            self._model = model.to(self.device)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], plan: Sampling, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        """Yield responses as they are finished, a batch of `max_num_seqs` rows (whole groups) at a time.

        A batch of which some prompts are done is sampled whole all the same: the last digits of a row depend on how
        many rows it is multiplied with.
        """
        ensure_open(self)
        config = self._model.config
        limit = self.options.max_model_len or config.max_position_embeddings
        check_request(prompts, seeds, plan, vocab_size=config.vocab_size, max_model_len=limit)
        return self._batches(prompts, seeds, plan, done)

    def describe(self) -> dict[str, str]:
        """Engine, version, dtype of the arithmetic, log-probability mode."""
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "dtype": str(self._model.dtype).removeprefix("torch.") if self._model else self.options.dtype,
            "logprobs_mode": "processed_logprobs",
        }

    def sleep(self) -> None:
        """Move the weights to the host; `generate` moves them back."""
        ensure_open(self)
        self._model.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Drop the weights."""
        self.closed = True
        self._model = None

    def _batches(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], plan: Sampling, done: Collection[int]
    ) -> Iterator[Completion]:
        self._model.to(self.device)
        deadline = time.monotonic() + self.options.timeout
        groups = max(1, self.options.max_num_seqs // (plan.beams or len(plan.samples)))
        kind = _SampledBatch if plan.beams is None else _SearchedBatch
        for start in range(0, len(prompts), groups):
            chosen = range(start, min(start + groups, len(prompts)))
            if all(index in done for index in chosen):
                continue
            with fatal(self, "reading the prompts"):
                batch = kind(self._model, [(i, prompts[i], seeds[i]) for i in chosen], plan, self.device)
            while batch.going:
                with fatal(self, "sampling"):
                    finished = batch.step()
                    if time.monotonic() > deadline:
                        raise EngineError(f"sampling took longer than {self.options.timeout} s", do="raise timeout")
                yield from (completion for completion in finished if completion.prompt not in done)


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: int
    sample: int
    seed: int


LEAST_GOING = 0.75
"""Share of a batch's rows that go on: with fewer, the others are taken out. That copies all that was read, and costs as
much as some rounds in which rows that have ended are read on."""


class _SampledBatch:
    """Rows that are sampled together: every sample of some prompts."""

    def __init__(
        self, model: Any, prompts: list[tuple[int, Sequence[int], int]], plan: Sampling, device: torch.device
    ) -> None:
        self.plan = plan
        self.rows = [
            _Row(index, sample, response_seed(seed, sample)) for index, _, seed in prompts for sample in plan.samples
        ]
        self.uniforms = torch.stack([_uniforms(row, plan.max_tokens) for row in self.rows]).to(device)
        self.greedy = torch.tensor([row.sample == GREEDY for row in self.rows], device=device)
        self.stop = torch.tensor(plan.stop_ids, dtype=torch.long, device=device)
        self.unfinished = torch.ones_like(self.greedy)
        self.tokens = torch.zeros(self.uniforms.shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(self.uniforms.shape, device=device)
        self.taken = 0
        self.reader = Reader(model, [prompt for _, prompt, _ in prompts], device)
        # One prompt is read once; its group shares what was read.
        self.reader.select(torch.arange(len(prompts), device=device).repeat_interleave(len(plan.samples)))

    @property
    def going(self) -> bool:
        """Whether any response is unfinished."""
        return bool(self.unfinished.any())

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Sample one token per row and return the responses that end with it."""
        uniforms = self.uniforms[:, self.taken]
        tokens, logprobs = sample_tokens(self.reader.logits, uniforms, self.greedy, self.plan)
        self.tokens[:, self.taken], self.logprobs[:, self.taken] = tokens, logprobs
        self.taken += 1
        stopped = torch.isin(tokens, self.stop)
        ended = self.unfinished & (stopped | (self.taken == self.plan.max_tokens))
        finished = [self._completion(row, bool(stopped[row])) for row in ended.nonzero()[:, 0].tolist()]
        self.unfinished &= ~ended
        going = int(self.unfinished.sum())
        if going:
            if going < LEAST_GOING * len(self.rows):
                tokens = tokens[self._keep(rounded(going))]
            self.reader.read(tokens)
        return finished

    def _completion(self, row: int, stopped: bool) -> Completion:
        about, said = self.rows[row], slice(0, self.taken)
        tokens, logprobs = self.tokens[row, said].tolist(), self.logprobs[row, said].tolist()
        return Completion(about.prompt, about.sample, tokens, logprobs, "stop" if stopped else "length", about.seed)

    def _keep(self, count: int) -> Tensor:
        """Go on with so many rows alone, unfinished ones before others, and return them."""
        rows = torch.argsort(~self.unfinished, stable=True)[:count].sort().values
        self.rows = [self.rows[row] for row in rows.tolist()]
        for name in ("uniforms", "greedy", "unfinished", "tokens", "logprobs"):
            setattr(self, name, getattr(self, name)[rows])
        self.reader.select(rows)
        return rows


class _SearchedBatch:
    """Prompts that are searched together; the rows are their growing beams, search after search."""

    def __init__(
        self, model: Any, prompts: list[tuple[int, Sequence[int], int]], plan: Sampling, device: torch.device
    ) -> None:
        self.searches = [BeamSearch(index, plan) for index, _, _ in prompts]
        self.seeds = {index: seed for index, _, seed in prompts}
        self.choices = min(BeamSearch.choices(plan), model.config.vocab_size)
        self.device = device
        self.reader = Reader(model, [prompt for _, prompt, _ in prompts], device)

    @property
    def going(self) -> bool:
        """Whether any search is."""
        return bool(self.searches)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Let every beam grow by one token and return the groups of the searches that are over with it."""
        best = torch.log_softmax(self.reader.logits, dim=-1).topk(self.choices, dim=-1)
        following = [
            [Next(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]
            for tokens, logprobs in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        parents: list[int] = []
        start = 0
        for search in self.searches:
            end = start + len(search.growing)
            parents += [start + place for place in search.advance(following[start:end])]
            start = end
        over = [search for search in self.searches if not search.growing]
        self.searches = [search for search in self.searches if search.growing]
        if self.searches:
            last = [beam.tokens[-1] for search in self.searches for beam in search.growing]
            self.reader.select(torch.tensor(parents, device=self.device))
            self.reader.read(torch.tensor(last, device=self.device))
        return [completion for search in over for completion in search.completions(self.seeds[search.prompt])]


def sample_tokens(
    logits: Float[Tensor, "R V"], uniforms: Float[Tensor, " R"], greedy: Tensor, plan: Sampling
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """One token per row and its log-probability, by inverting the cumulated distribution at `uniforms` in [0, 1).

    Greedy rows take the argmax, with its log-probability at temperature 1 and uncut.
    """
    logprobs = torch.log_softmax(cut(logits / plan.temperature, top_k=plan.top_k, top_p=plan.top_p), dim=-1)
    # Cumulated in float64: the last float32 digits of a long sum would decide for rare tokens.
    cumulated = logprobs.double().exp().cumsum(dim=-1)
    # Never above the last token that has any probability, whatever the sum was rounded to.
    target = torch.minimum(uniforms * cumulated[:, -1], cumulated[:, -1] * (1 - 2**-52))
    drawn = torch.searchsorted(cumulated, target[:, None], right=True)
    tokens = torch.where(greedy[:, None], logits.argmax(dim=-1, keepdim=True), drawn)
    chosen = torch.where(greedy[:, None], torch.log_softmax(logits, dim=-1), logprobs).gather(1, tokens)
    return tokens[:, 0], chosen[:, 0]


def cut(logits: Float[Tensor, "R V"], *, top_k: int | None, top_p: float) -> Float[Tensor, "R V"]:
    """Minus infinity for all but the `top_k` likeliest tokens, then for all outside the smallest set that has `top_p`.

    The likeliest token always stays.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ranked.softmax(dim=-1)
        above = probabilities.cumsum(dim=-1) - probabilities
        outside = above >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return logits


def _uniforms(row: _Row, count: int) -> Float[Tensor, " T"]:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(row.seed))


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)
