"""The reference engine: a plain sampling loop over a Hugging Face model, exact and everywhere.

A response depends on its prompt, its seed and the weights, and not on what it is batched with: its uniform numbers
are drawn up front from its own generator, and a token is where the cumulated probabilities pass the next of them.
"""

import time
from collections.abc import Iterator, Sequence
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
                checkpoint, dtype=_dtype(self.options.dtype), output_loading_info=True, local_files_only=True
            )
            if loading["missing_keys"]:
                raise EngineError(f"no tensor for {sorted(loading['missing_keys'])}", where=str(checkpoint))
            self._model = model.to(self.device).eval()

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], plan: Sampling) -> Iterator[Completion]:
        """Yield responses as they are finished, a batch of `max_num_seqs` rows (whole groups) at a time."""
        ensure_open(self)
        config = self._model.config
        limit = self.options.max_model_len or config.max_position_embeddings
        check_request(prompts, seeds, plan, vocab_size=config.vocab_size, max_model_len=limit)
        return self._batches(prompts, seeds, plan)

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

    def _batches(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], plan: Sampling) -> Iterator[Completion]:
        self._model.to(self.device)
        deadline = time.monotonic() + self.options.timeout
        groups = max(1, self.options.max_num_seqs // len(plan.samples))
        for start in range(0, len(prompts), groups):
            chosen = range(start, min(start + groups, len(prompts)))
            with fatal(self, "reading the prompts"):
                batch = _Batch(self._model, [(i, prompts[i], seeds[i]) for i in chosen], plan, self.device)
            while batch.rows:
                with fatal(self, "sampling"):
                    finished = batch.step()
                    if time.monotonic() > deadline:
                        raise EngineError(f"sampling took longer than {self.options.timeout} s", do="raise timeout")
                yield from finished


@dataclass(slots=True)
class _Row:
    prompt: int
    sample: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Batch:
    """Rows that are sampled together: every sample of some prompts, left-padded to one length."""

    def __init__(
        self, model: Any, prompts: list[tuple[int, Sequence[int], int]], plan: Sampling, device: torch.device
    ) -> None:
        self.model, self.plan = model, plan
        self.rows = [
            _Row(index, sample, response_seed(seed, sample)) for index, _, seed in prompts for sample in plan.samples
        ]
        self.uniforms = torch.stack([_uniforms(row, plan.max_tokens) for row in self.rows]).to(device)
        self.greedy = torch.tensor([row.sample == GREEDY for row in self.rows], device=device)
        self.stop = torch.tensor(plan.stop_ids, dtype=torch.long, device=device)
        self.taken = 0

        width = max(len(prompt) for _, prompt, _ in prompts)
        self.tokens = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        self.attended = torch.zeros_like(self.tokens)
        for row, (_, prompt, _) in enumerate(prompts):
            self.tokens[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            self.attended[row, width - len(prompt) :] = 1
        self.cache = DynamicCache(config=model.config)
        self.logits = self._forward()
        # One prompt is read once; its group shares what was read.
        self._select(torch.arange(len(prompts), device=device).repeat_interleave(len(plan.samples)))

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Sample one token per row and return the responses that end with it."""
        if self.taken:
            self.logits = self._forward()
        tokens, logprobs = sample_tokens(self.logits, self.uniforms[:, self.taken], self.greedy, self.plan)
        self.taken += 1
        stopped = torch.isin(tokens, self.stop)
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
        self.tokens = tokens[:, None]
        self.attended = torch.cat([self.attended, torch.ones_like(self.tokens)], dim=1)
        ended = stopped if self.taken < self.plan.max_tokens else torch.ones_like(stopped)
        return self._release(ended, stopped) if ended.any() else []

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
        self._select(going)
        return finished

    def _select(self, rows: Int[Tensor, " R"]) -> None:
        self.tokens, self.attended, self.logits = self.tokens[rows], self.attended[rows], self.logits[rows]
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
