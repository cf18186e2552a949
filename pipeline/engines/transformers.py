"""The reference engine: a plain sampling loop over a Hugging Face model, exact and everywhere.

A response depends on its prompt, its seed and the weights, and not on what it is batched with: its uniform numbers
are drawn up front from its own generator, and a token is where the cumulated probabilities pass the next of them.
Beams are searched as `beams.py` says.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

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
        self._model = None
        with fatal(self, "loading the checkpoint", checkpoint), _no_progress_bar():
            model, loading = AutoModelForCausalLM.from_pretrained(
                checkpoint,
                dtype=_dtype(self.options.dtype),
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            if loading["missing_keys"]:
                raise EngineError(f"no tensor for {sorted(loading['missing_keys'])}", where=str(checkpoint))
            self._model = model.to(self.device).eval()

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


@dataclass(slots=True)
class _Row:
    prompt: int
    sample: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Reader:
    """Texts that are read together, left-padded to one length; each round takes one more token of each."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.model = model
        width = max(map(len, prompts))
        self.tokens = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        self.attended = torch.zeros_like(self.tokens)
        for row, prompt in enumerate(prompts):
            self.tokens[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            self.attended[row, width - len(prompt) :] = 1
        self.cache = DynamicCache(config=model.config)
        self.logits = self._forward()

    def read(self, tokens: Int[Tensor, " R"]) -> None:
        """Let each text go on with its token."""
        self.tokens = tokens[:, None]
        self.attended = torch.cat([self.attended, torch.ones_like(self.tokens)], dim=1)
        self.logits = self._forward()

    def select(self, rows: Int[Tensor, " N"]) -> None:
        """Go on with these texts, some of them several times: what was read of them is shared."""
        self.attended, self.logits = self.attended[rows], self.logits[rows]
        self.cache.batch_select_indices(rows)

    @torch.inference_mode()
    def _forward(self) -> Float[Tensor, "R V"]:
        positions = (self.attended.cumsum(dim=1) - 1).clamp(min=0)[:, -self.tokens.shape[1] :]
        output = self.model(
            input_ids=self.tokens,
            attention_mask=self.attended,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        if not torch.isfinite(logits).all():
            raise EngineError("the model's logits are not finite", do="check the checkpoint's tensors")
        return logits


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
        self.taken = 0
        self.reader = _Reader(model, [prompt for _, prompt, _ in prompts], device)
        # One prompt is read once; its group shares what was read.
        self.reader.select(torch.arange(len(prompts), device=device).repeat_interleave(len(plan.samples)))

    @property
    def going(self) -> bool:
        """Whether any response is unfinished."""
        return bool(self.rows)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Sample one token per row and return the responses that end with it."""
        uniforms = self.uniforms[:, self.taken]
        tokens, logprobs = sample_tokens(self.reader.logits, uniforms, self.greedy, self.plan)
        self.taken += 1
        stopped = torch.isin(tokens, self.stop)
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
        ended = stopped if self.taken < self.plan.max_tokens else torch.ones_like(stopped)
        finished = self._release(ended, stopped) if ended.any() else []
        if self.rows:
            self.reader.read(tokens[~ended])
        return finished

    def _release(self, ended: Tensor, stopped: Tensor) -> list[Completion]:
        finish: dict[bool, Literal["stop", "length"]] = {True: "stop", False: "length"}
        finished = [
            Completion(row.prompt, row.sample, row.tokens, row.logprobs, finish[stop], row.seed)
            for row, end, stop in zip(self.rows, ended.tolist(), stopped.tolist(), strict=True)
            if end
        ]
        going = (~ended).nonzero()[:, 0]
        self.rows = [self.rows[row] for row in going.tolist()]
        self.uniforms, self.greedy = self.uniforms[going], self.greedy[going]
        self.reader.select(going)
        return finished


class _SearchedBatch:
    """Prompts that are searched together; the rows are their growing beams, search after search."""

    def __init__(
        self, model: Any, prompts: list[tuple[int, Sequence[int], int]], plan: Sampling, device: torch.device
    ) -> None:
        self.searches = [BeamSearch(index, plan) for index, _, _ in prompts]
        self.seeds = {index: seed for index, _, seed in prompts}
        self.choices = min(BeamSearch.choices(plan), model.config.vocab_size)
        self.device = device
        self.reader = _Reader(model, [prompt for _, prompt, _ in prompts], device)

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


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
