"""Who samples: engines turn prompts and a policy checkpoint into responses.

    vllm.py            one offline vLLM engine; CPU and GPU builds alike
    transformers.py    the reference: exact, runs wherever torch runs
    scripted.py        says what it is told to say
    beams.py           beam search, for the first two

All of them speak token ids, never text, and mean the same by every setting: a sampled token is drawn from
softmax(logits / temperature), cut to `top_k` and then to `top_p` and renormalised, and its log-probability is taken
under that same distribution. A greedy token is the argmax; its log-probability is the model's at temperature 1, uncut.

Adding an engine is one file and one line in `ENGINES`; the conformance suite does the rest.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import Field, model_validator

from pipeline.errors import EngineError, ExperimentError
from pipeline.settings import Settings

GREEDY = -1
ENGINES = {
    "vllm": "pipeline.engines.vllm:VllmEngine",
    "transformers": "pipeline.engines.transformers:TransformersEngine",
    "scripted": "pipeline.engines.scripted:ScriptedEngine",
}


class Sampling(Settings):
    """How to sample one group of responses per prompt."""

    group_size: int = Field(ge=0)
    """Sampled responses per prompt. 0 together with `greedy` asks for the greedy response alone."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits before the softmax."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens whose probability reaches this. 1 cuts nothing."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from the k most likely tokens; None cuts nothing."""
    max_tokens: int = Field(ge=1)
    """Longest response, in tokens, the end token included."""
    stop_ids: tuple[int, ...]
    """A response ends with the first of these tokens, and keeps it. No other token ends it."""
    greedy: bool = False
    """Also one greedy response per prompt, as sample -1."""
    beams: int | None = Field(default=None, ge=1)
    """Search with so many beams; the group is the best of them, the likeliest first. None samples."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> "Sampling":
        if self.group_size == 0 and not self.greedy:
            raise ValueError("group_size = 0 without greedy asks for no response at all")
        check_beams(self)
        return self

    @property
    def samples(self) -> range:
        """The `sample` numbers of one whole group, the greedy one first."""
        return range(GREEDY if self.greedy else 0, self.group_size)


def check_beams(plan: Any) -> None:
    """Raise `ValueError` for a beam search that would also have to draw, or to find more than it keeps.

    `plan` is a `Sampling`, or settings with the same names that are to become one.
    """
    if plan.beams is None:
        return
    if plan.beams < plan.group_size:
        raise ValueError(f"beams = {plan.beams} cannot give group_size = {plan.group_size} responses")
    if (plan.temperature, plan.top_p, plan.top_k, plan.greedy) != (1.0, 1.0, None, False):
        raise ValueError("beams draw nothing: leave temperature, top_p, top_k and greedy at their defaults")


class EngineOptions(Settings):
    """How an engine is built. Two engines with equal options can stand in for each other."""

    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Arithmetic and weights; `auto` takes what the checkpoint's config names."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus response, in tokens; None takes the model's own limit."""
    seed: int = Field(default=0, ge=0)
    """Seed of whatever no request's seed decides."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for weights and cache. Unused on a CPU."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Devices that share one engine's weights. Only vLLM knows it."""
    max_num_seqs: int = Field(default=512, ge=1)
    """Responses in flight at once."""
    timeout: float = Field(default=3600.0, gt=0)
    """Longest time one `generate` may compute, in seconds; an engine past it is given up."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One response."""

    prompt: int
    """Index into the prompts that were handed over."""
    sample: int
    """0 .. group_size - 1, or -1 for the greedy response."""
    tokens: list[int]
    """Response token ids, with the end token when `finish` is `stop`."""
    logprobs: list[float] | None
    """Natural log-probability of each token under the distribution it was drawn from; None where unknown."""
    finish: Literal["stop", "length"]
    seed: int
    """Of this response: its prompt's seed plus `sample`, and the prompt's seed itself for what is not drawn."""


class Request(NamedTuple):
    """Prompts to be answered by a group of responses each."""

    prompts: Sequence[Sequence[int]]
    """Token ids."""
    seeds: Sequence[int]
    """One per prompt."""
    done: Collection[int] = ()
    """Indices of the prompts whose groups are there."""


class Memory(NamedTuple):
    """Memory in use on an engine's devices, all of them together and by anybody. [GB]"""

    awake: float
    """Before the engine went to sleep."""
    asleep: float
    """After that."""


@runtime_checkable
class Engine(Protocol):
    """Samples responses from a policy checkpoint.

    `EngineError` from `load`, or while `generate` is being read, leaves the engine closed: build another. `generate`
    refuses a request that it cannot serve before it submits anything, and stays open.
    """

    closed: bool

    def load(self, checkpoint: Path) -> None:
        """Sample from these weights from now on."""
        ...

    def generate(self, request: Request, plan: Sampling, then: Request | None = None) -> Iterator[Completion]:
        """Yield every response of every group, in the order in which they are finished.

        Groups of prompts that are `done` are there from an earlier call with the same request, and are not yielded. On
        a CPU the others are, bit for bit, what that call would have gone on with.

        `then` is what the next call will ask for, under the same plan: an engine may begin with it. It yields nothing
        of that, and changes nothing but how long the next call takes.
        """
        ...

    def describe(self) -> dict[str, str]:
        """What the log-probabilities depend on: engine, version, dtype, logprobs_mode."""
        ...

    def sleep(self) -> Memory | None:
        """Give accelerator memory back; the next `generate` or `load` takes it again.

        What that freed, where the engine knows: None without an accelerator, and for one that is asleep already.
        """
        ...

    def close(self) -> None:
        """Give everything back, for good."""
        ...


_warm: dict[tuple[str, EngineOptions], Engine] = {}


def open_engine(name: str, checkpoint: Path, options: EngineOptions) -> Engine:
    """Return the engine called `name`, ready to sample from `checkpoint`.

    One engine stays warm per process: the same name and options get it back, with the new weights loaded; others
    replace it. An engine that failed is never handed out again. Raises `ExperimentError` for an unknown name and
    `EngineError` when the checkpoint cannot be loaded.
    """
    if name not in ENGINES:
        raise ExperimentError(f"no engine is called {name!r}; there are: {', '.join(ENGINES)}")
    if options.tensor_parallel > 1 and name != "vllm":
        raise ExperimentError(f"{name} samples on one device, and tensor_parallel = {options.tensor_parallel}")
    warm = _warm.get((name, options))
    if warm is not None and not warm.closed:
        warm.load(checkpoint)
        return warm
    close_engines()
    module, _, attribute = ENGINES[name].partition(":")
    engine: Engine = getattr(import_module(module), attribute)(options)
    engine.load(checkpoint)
    _warm[name, options] = engine
    return engine


def close_engines() -> None:
    """Close the warm engine, if there is one."""
    while _warm:
        _warm.popitem()[1].close()


def response_seed(seed: int, sample: int) -> int:
    """The seed of one response: consecutive within a group, which is how vLLM seeds the siblings of a request."""
    return seed + max(sample, 0)


def check_request(request: Request, plan: Sampling, *, vocab_size: int, max_model_len: int) -> None:
    """Raise `EngineError`, naming the index, for the first prompt or seed that no engine could serve.

    Engines cut a response that does not fit, or refuse the whole batch half-way; here the request is refused whole.
    """
    if plan.beams is not None and plan.beams > vocab_size:
        raise EngineError(
            f"{plan.beams} beams are more than the vocabulary's {vocab_size} tokens", do="search with fewer beams"
        )
    prompts, seeds, _ = request
    if len(prompts) != len(seeds):
        raise EngineError(f"{len(prompts)} prompts but {len(seeds)} seeds", do="hand over one seed per prompt")
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        where = f"prompt {index}"
        if not prompt:
            raise EngineError("the prompt is empty", where=where)
        if len(prompt) + plan.max_tokens > max_model_len:
            raise EngineError(
                f"{len(prompt)} prompt tokens and up to {plan.max_tokens} response tokens do not fit into "
                f"{max_model_len}",
                where=where,
                do="drop the prompt, lower max_tokens, or raise max_model_len",
            )
        foreign = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if foreign is not None:
            raise EngineError(f"token id {foreign} is outside the vocabulary of {vocab_size}", where=where)
        if not 0 <= seed < 2**63 - plan.group_size:
            raise EngineError(f"seed {seed} is outside [0, 2^63 - group_size)", where=where)


@contextmanager
def fatal(engine: Engine, doing: str, where: object = "") -> Iterator[None]:
    """Close `engine` on any exception, and let it leave as an `EngineError`: what is inside is not to be trusted.

    After a failure vLLM keeps requests that never finish, so even a repaired engine would hang.
    """
    try:
        yield
    except EngineError:
        engine.close()
        raise
    except Exception as error:
        engine.close()
        raise EngineError(
            f"{doing} failed: {type(error).__name__}: {error}",
            where=str(where),
            do="the engine is closed; open another, after checking the checkpoint",
        ) from error
    except BaseException:
        engine.close()
        raise


def ensure_open(engine: Engine) -> None:
    """Raise `EngineError` if the engine has been closed."""
    if engine.closed:
        raise EngineError("this engine is closed", do="open another with open_engine")
