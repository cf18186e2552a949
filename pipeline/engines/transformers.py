"""The reference engine: a plain sampling loop over a Hugging Face model, exact and everywhere.

A response depends on its prompt, its seed and the weights, and not on what it is batched with: its uniform numbers
are drawn up front from its own generator, and a token is where the cumulated probabilities pass the next of them.
Beams are searched as `beams.py` says.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.building import built, refilled
from pipeline.engines import (
    GREEDY,
    Completion,
    EngineOptions,
    Request,
    Sampling,
    check_request,
    ensure_open,
    fatal,
    response_seed,
)
from pipeline.engines.beams import BeamSearch, Next
from pipeline.engines.reading import Reader
from pipeline.errors import EngineError


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
            asked = (AutoModelForCausalLM, checkpoint, _dtype(self.options.dtype))
            if self._model is None or not refilled(self._model, *asked):
                self._model = None  # before there are two
                self._model, missing = built(*asked)
                if missing:
                    raise EngineError(f"no tensor for {sorted(missing)}", where=str(checkpoint))

    def generate(self, request: Request, plan: Sampling, then: Request | None = None) -> Iterator[Completion]:
        """Yield responses as they are finished, a batch of `max_num_seqs` rows (whole groups) at a time.

        A batch of which some prompts are done is sampled whole all the same: the last digits of a row depend on how
        many rows it is multiplied with.
        """
        ensure_open(self)
        config = self._model.config
        limit = self.options.max_model_len or config.max_position_embeddings
        check_request(request, plan, vocab_size=config.vocab_size, max_model_len=limit)
        return self._batches(request, plan)

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
        self._move(torch.device("cpu"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Drop the weights."""
        self.closed = True
        self._model = None

    def _move(self, device: torch.device) -> None:
        if self._model.device != device:
            self._model.to(device)

    def _batches(self, request: Request, plan: Sampling) -> Iterator[Completion]:
        prompts, seeds, done = request
        self._move(self.device)
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
        self.unfinished = np.arange(len(self.rows))
        self.text = np.arange(len(prompts)).repeat(len(plan.samples))
        """Which of the reader's texts each unfinished row is so far: rows that said the same share one."""
        self.tokens = torch.zeros(self.uniforms.shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(self.uniforms.shape, device=device)
        self.taken = 0
        self.reader = Reader(model, [prompt for _, prompt, _ in prompts], len(self.rows), device)

    @property
    def going(self) -> bool:
        """Whether any response is unfinished."""
        return len(self.unfinished) > 0

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Sample one token per row and return the responses that end with it."""
        rows = torch.from_numpy(self.unfinished).to(self.tokens.device)
        tokens, logprobs = sample_tokens(
            self.reader.logits[self.text], self.uniforms[rows, self.taken], self.greedy[rows], self.plan
        )
        self.tokens[rows, self.taken], self.logprobs[rows, self.taken] = tokens, logprobs
        self.taken += 1
        stopped = torch.isin(tokens, self.stop).cpu().numpy()
        ended = stopped | (self.taken == self.plan.max_tokens)
        finished = [
            self._completion(row, bool(stop)) for row, stop in zip(self.unfinished[ended], stopped[ended], strict=True)
        ]
        self.unfinished = self.unfinished[~ended]
        if self.going:
            said = tokens.cpu().numpy()[~ended]
            vocab_size = self.reader.logits.shape[-1]
            ways, self.text = np.unique(self.text[~ended] * vocab_size + said, return_inverse=True)
            self.reader.read(ways // vocab_size, torch.from_numpy(ways % vocab_size).to(self.tokens.device))
        return finished

    def _completion(self, row: int, stopped: bool) -> Completion:
        about, said = self.rows[row], slice(0, self.taken)
        tokens, logprobs = self.tokens[row, said].tolist(), self.logprobs[row, said].tolist()
        return Completion(about.prompt, about.sample, tokens, logprobs, "stop" if stopped else "length", about.seed)


class _SearchedBatch:
    """Prompts that are searched together; the rows are their growing beams, search after search."""

    def __init__(
        self, model: Any, prompts: list[tuple[int, Sequence[int], int]], plan: Sampling, device: torch.device
    ) -> None:
        self.searches = [BeamSearch(index, plan) for index, _, _ in prompts]
        self.seeds = {index: seed for index, _, seed in prompts}
        self.choices = min(BeamSearch.choices(plan), model.config.vocab_size)
        self.device = device
        self.reader = Reader(model, [prompt for _, prompt, _ in prompts], len(prompts) * (plan.beams or 1), device)

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
            self.reader.read(np.array(parents), torch.tensor(last, device=self.device))
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
