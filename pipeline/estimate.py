"""What an iteration will take, reckoned from its experiment alone: bytes, memory, operations, seconds. Arithmetic only.

Every number is of one of three kinds, and says so: counted (bytes of columns, of tensors), bounded from below (memory
that nobody can do without), or guessed at by a share of a device's peak that others reach (seconds).

P: parameters, N: tokens of an iteration's responses, Q: of their prompts, w: width, f: width of the feed-forward layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from pipeline.errors import ExperimentError

FLOAT = INT = 4
"""Bytes of a number in a column, a weight or a moment in float32."""
HALF = 2
"""Bytes of a number in bfloat16."""
TEXT = 4
"""Bytes of text per token: a token is about four characters."""
ROW = 200
"""Bytes of a row besides what it has per token."""
TABLE = 8000
"""Bytes of a Parquet file besides its rows: schema, statistics."""

TRAINED_AT = 0.35
"""Share of a device's peak that training and reading reach; MegaScale (arXiv:2402.15627) has 0.55 at the best."""
DECODED_AT = 0.6
"""Share of a device's memory bandwidth that decoding reaches."""
WIDTHS = 40
"""Bytes per token, layer and unit of w that a backward pass keeps besides the feed-forward layer: residuals and norms,
in float32 always, queries, keys, values. Counted: Qwen2 36 to 40, Qwen3 46 to 52, in both arithmetics."""
GATED = 4
"""Numbers per token, layer and unit of f that it keeps: the gate before and after its function, what it gates, their
product."""
RECOMPUTED = FLOAT
"""Bytes per token, layer and unit of w that stay where activations are recomputed: each layer's input."""
READ = 512
"""Responses that a worker reads at a time (`SHARD` of stage `score`)."""

MIXTURES = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configs call the number of experts, of which a token sees a few."""

STARTS: Mapping[str, float] = {
    "rollout": 9.9, "label": 3.3, "score": 4.1, "advantage": 1.4, "value": 3.9, "update": 3.9
}  # fmt: skip
"""Seconds from the start of a stage's process until it works: imports, vLLM's start. Measured on two cores with a model
of 0.8M parameters (tests/benchmarks/README.md); what vLLM compiles and captures on a GPU comes on top."""
TORCHRUN = 3.0
"""Seconds that torchrun takes besides: it has its own imports before it starts processes. Measured as the others, on a
machine that was busy, by the ratio to a stage that torchrun does not start."""
RANKS = frozenset({"score", "value", "update"})
"""Stages that torchrun starts."""
STARTED: Mapping[str, frozenset[str]] = {
    "inline": frozenset(), "process": frozenset(STARTS), "torchrun": frozenset(STARTS),
    "ray": frozenset({"rollout", "label", "score"}),
}  # fmt: skip
"""Launcher -> stages whose processes are new in every iteration: Ray's workers give way to those of the next stage."""


@dataclass(frozen=True)
class Device:
    """A kind of accelerator. Sources: the vendors' data sheets, dense numbers."""

    memory: float
    """[byte]"""
    flops: float
    """[1/s], in bfloat16."""
    flops32: float
    """[1/s], in float32."""
    bandwidth: float
    """Of its memory. [byte/s]"""
    step: float
    """Least time of a decoding step: launches, scheduling, sampling. [s]"""
    storage: float = 2e9
    """Of what holds the runs: a good network disk. [byte/s]"""
    core: bool = False
    """Several of them are one device: a process computes with all, and they share one memory."""


DEVICES: Mapping[str, Device] = {
    "a100": Device(80e9, 312e12, 19.5e12, 2.0e12, 0.01),
    "h100": Device(80e9, 989e12, 67e12, 3.35e12, 0.01),
    "h200": Device(141e9, 989e12, 67e12, 4.8e12, 0.01),
    "core": Device(8e9, 5e10, 5e10, 1e10, 0.02, 5e8, core=True),
}


@dataclass(frozen=True)
class Shape:
    """A model, as its config tells."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    """Width of a head."""
    hidden: int
    """Width of the gated feed-forward layer."""
    vocabulary: int
    tied: bool
    """No matrix but the embedding has a row per token: the head shares it, or there is none (a critic)."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From the `config.json` of a llama-like model.

        Raises `KeyError` for one that is not, `ExperimentError` for a mixture of experts.
        """
        for name in MIXTURES:
            if config.get(name):
                raise ExperimentError(
                    f"{name} = {config[name]}: mixtures of experts are not reckoned", "config.json of the policy",
                    "name a model without experts",
                )  # fmt: skip
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"], config["hidden_size"], heads, config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads, config["intermediate_size"],
            config["vocab_size"], bool(config.get("tie_word_embeddings", False)),
        )  # fmt: skip

    @property
    def layer(self) -> int:
        """Weights of a layer: w h_q d + 2 w h_kv d + h_q d w + 3 w f + 2 w."""
        return 2 * self.width * self.head * (self.heads + self.kv_heads) + 3 * self.width * self.hidden + 2 * self.width

    @property
    def rest(self) -> int:
        """Weights of embedding, head and last norm: V w (1 or 2) + w."""
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.width

    @property
    def parameters(self) -> int:
        """All weights: P = L layer + rest."""
        return self.layers * self.layer + self.rest

    def adapters(self, rank: int) -> int:
        """Weights of low-rank adapters of all linear layers: rank (in + out) of each."""
        attention = 4 * self.width + 2 * self.head * (self.heads + self.kv_heads)
        return self.layers * rank * (attention + 3 * (self.width + self.hidden))

    @property
    def cache(self) -> int:
        """Bytes of keys and values per token, in half precision."""
        return 2 * HALF * self.layers * self.kv_heads * self.head


@dataclass(frozen=True)
class Work:
    """An iteration's rows, and what the recipe asks for of them."""

    responses: int
    group: int
    """Responses to a prompt."""
    prompt_tokens: int
    """Of a prompt, at most."""
    response_tokens: float
    """Of a response, on average."""
    longest: float
    """Of a response, at most; one at least is as long."""
    needs: int
    """Columns that models fill before the update."""
    epochs: int
    minibatches: int
    """Optimizer steps of an epoch."""
    critic: Shape | None = None
    """What the update of the critic trains; None where the recipe has none."""

    @property
    def tokens(self) -> float:
        """N: of all responses."""
        return self.responses * self.response_tokens

    @property
    def read(self) -> float:
        """Q + N: of prompts and responses, as a forward pass reads them."""
        return self.responses * (self.prompt_tokens + self.response_tokens)

    @property
    def row(self) -> float:
        """Tokens of the longest row."""
        return self.prompt_tokens + self.longest


@dataclass(frozen=True)
class Sampler:
    """How responses are sampled."""

    weight: int
    """Bytes of a weight."""
    devices: int = 1
    """That share an engine's weights and cache."""
    at_once: int = 512
    """Responses that an engine has in flight, at most."""
    filled: float = 0.9
    """Share of a device's memory that an engine takes, at most."""


@dataclass(frozen=True)
class Training:
    """How models are trained and read with."""

    micro_batch: int
    """Tokens at once; a longer row goes alone."""
    half: bool = False
    """Layers compute in bfloat16."""
    recompute: bool = False
    """Activations are made again for the backward pass."""
    rank: int | None = None
    """Of the policy's adapters; None where its weights are trained."""
    critic_rank: int | None = None
    """Of the critic's."""
    offload: bool = False
    """Moments lie in the host's memory."""

    def at_once(self, work: Work) -> float:
        """Tokens of the largest micro-batch."""
        return max(work.row, min(self.micro_batch, work.read / work.minibatches))

    def activations(self, shape: Shape, tokens: float) -> float:
        """Bytes that a backward pass over a micro-batch keeps: of all layers, or of one and the inputs of all.

            tokens (40 w + 4 f b) + layer b        per layer, b: 2 in bfloat16, 4 in float32; the last term in bfloat16

        The last term are the half-precision copies that layers multiply with. Attention keeps no square of a row.
        """
        layers = 1 if self.recompute else shape.layers
        kept = tokens * (WIDTHS * shape.width + GATED * (HALF if self.half else FLOAT) * shape.hidden)
        inputs = tokens * RECOMPUTED * shape.width * shape.layers if self.recompute else 0
        return float(layers * (kept + HALF * shape.layer * self.half) + inputs)

    def held(self, shape: Shape, rank: int | None, ranks: int = 1) -> float:
        """Bytes of weights, gradients and moments on each of the devices of that many processes.

        Where several share them, one has all of embedding and head besides its share, with their gradients if they are
        trained: they are gathered for a whole pass.
        """
        gathered = (FLOAT if ranks > 1 else 0) * shape.rest * (2 if rank is None else 1)
        return trained(shape, rank, offload=self.offload) / ranks + gathered


@dataclass(frozen=True)
class Place:
    """Devices, and the launchers, which say how many of them a stage has."""

    device: Device
    count: int
    launcher: str
    launchers: Mapping[str, str] = field(default_factory=dict)
    """Stages -> their launchers, where those are others."""

    @classmethod
    def of(cls, device: Device, count: int, launcher: str, launchers: Mapping[str, str] | None = None) -> Self:
        """So many devices; cores are one."""
        if not device.core:
            return cls(device, count, launcher, launchers or {})
        whole = replace(
            device, memory=device.memory * count, flops=device.flops * count, flops32=device.flops32 * count,
            bandwidth=device.bandwidth * count,
        )  # fmt: skip
        return cls(whole, 1, launcher, launchers or {})

    def by(self, stage: str) -> str:
        """The launcher of a stage."""
        return self.launchers.get(stage, self.launcher)

    def ranks(self, stage: str) -> int:
        """Devices that share a model in a stage: all under torchrun, elsewhere one."""
        return self.count if self.by(stage) == "torchrun" else 1

    def readers(self, work: Work) -> int:
        """Devices that read: all under torchrun, as many as there are shards for under ray, elsewhere one."""
        return min(self.count, -(-work.responses // READ)) if self.by("score") == "ray" else self.ranks("score")

    def engines(self, sampler: Sampler) -> int:
        """Engines that there is room for under ray; elsewhere one."""
        return max(1, self.count // sampler.devices) if self.by("rollout") == "ray" else 1


@dataclass(frozen=True)
class Step:
    """What a stage takes in an iteration."""

    written: float
    """Bytes of the artifact, before compression: an upper bound."""
    seconds: float
    """At the shares of the peak that stand above."""
    start: float
    """Seconds before that: a process's start where the launcher gives the stage one, and reading its models."""
    memory: float
    """Bytes on each device: weights and what training keeps of them, a lower bound; activations of a micro-batch."""
    moved: float = 0.0
    """Bytes of checkpoints read and written."""


def checkpoint(shape: Shape, rank: int | None = None) -> float:
    """Bytes of weights, 4 P, and of AdamW's moments, 8 P; 12 A, with A weights of adapters, in place of these."""
    return float(FLOAT * (3 * shape.parameters if rank is None else shape.parameters + 3 * shape.adapters(rank)))


def trained(shape: Shape, rank: int | None = None, *, offload: bool = False) -> float:
    """Bytes of weights, gradients and two moments: 16 P; 4 P + 16 A where A weights of adapters are trained instead.

    With the moments in the host's memory 8 P, or 4 P + 8 A.
    """
    each = 2 if offload else 4
    return float(FLOAT * (each * shape.parameters if rank is None else shape.parameters + each * shape.adapters(rank)))


def hosted(shape: Shape, rank: int | None = None) -> float:
    """Bytes in the host's memory where the optimizer steps there: its copies of weights and gradients, and moments."""
    return float(4 * FLOAT * (shape.parameters if rank is None else shape.adapters(rank)))


def starting(stage: str, launcher: str) -> float:
    """Seconds until a stage's process works; 0 where it has none of its own."""
    besides = TORCHRUN if launcher == "torchrun" and stage in RANKS else 0.0
    return STARTS[stage] + besides if stage in STARTED[launcher] else 0.0


def shards(work: Work, sampler: Sampler, launcher: str) -> tuple[int, int]:
    """How often engines are asked in all, and responses each time.

    Under ray whole groups that fill an engine once; elsewhere all of them: an engine begins a part of the dataset while
    it ends the one before.
    """
    if launcher != "ray":
        return 1, work.responses
    size = min(-(-sampler.at_once // work.group) * work.group, work.responses)
    return -(-work.responses // size), size


def sampled(shape: Shape, work: Work, place: Place, sampler: Sampler) -> tuple[float, float]:
    """Seconds of decoding and bytes on a device.

        calls x (waves x mean x s(all in flight) + (longest - mean) x s(one in flight))
        s(held) = max(least step, (weights + keys and values) / bandwidth)

    A wave is as many responses as are in flight at once; each call ends with its longest response, which decodes alone.
    """
    device, weights = place.device, shape.parameters * sampler.weight
    whole, longest = ((work.prompt_tokens + tokens) * shape.cache for tokens in (work.response_tokens, work.longest))
    number, size = shards(work, sampler, place.by("rollout"))
    calls = -(-number // place.engines(sampler))
    fitting = max(1, int((sampler.filled * device.memory * sampler.devices - weights) // whole))
    at_once = min(sampler.at_once, size, fitting)

    def step(held: float) -> float:
        return max(device.step, (weights + held) / (sampler.devices * device.bandwidth * DECODED_AT))

    full = step(at_once * (work.prompt_tokens + work.response_tokens / 2) * shape.cache)
    waves = -(-size // at_once) * work.response_tokens * full
    tail = (work.longest - work.response_tokens) * step(longest)
    return calls * (waves + tail), (weights + max(at_once * whole, longest)) / sampler.devices


def iteration(shape: Shape, work: Work, place: Place, training: Training, sampler: Sampler) -> dict[str, Step]:
    """Stage -> what it takes.

    rollout    see `sampled`
    score      2 P (Q + N) operations per column
    update     6 P (Q + N) operations per epoch, 8 P with activations recomputed; a critic as much of its own
    """
    device, storage = place.device, place.device.storage
    speed = (device.flops if training.half else device.flops32) * TRAINED_AT
    weights, kept = float(shape.parameters * FLOAT), TABLE + ROW * work.responses
    read_at = weights / place.ranks("score")
    token_row = kept + work.responses * work.prompt_tokens * INT
    decoding, engine = sampled(shape, work, place, sampler)

    def step(name: str, written: float, seconds: float, memory: float, read: float = 0.0, saved: float = 0.0) -> Step:
        start = starting(name, place.by(name))
        return Step(written, seconds + saved / storage, start + read / storage, memory, read + saved)

    def stepped(name: str, of: Shape, rank: int | None) -> Step:
        saved, ranks = checkpoint(of, rank), place.ranks(name)
        held = training.held(of, rank, ranks) + training.activations(of, training.at_once(work))
        passes = (8 if training.recompute else 6) * work.epochs
        return step(name, saved, passes * of.parameters * work.read / (speed * ranks), held, saved, saved)

    reading = work.needs * 2 * shape.parameters * work.read / (speed * place.readers(work))
    steps = {
        "rollout": step("rollout", token_row + work.tokens * (INT + FLOAT + TEXT), decoding, engine, weights),
        "label": step("label", kept, 0.0, 0.0),
        "score": step("score", kept + work.tokens * FLOAT * work.needs, reading, read_at, work.needs * weights),
        "advantage": step("advantage", token_row + work.tokens * (2 * INT + FLOAT * (1 + work.needs)), 0.0, 0.0),
        "update": stepped("update", shape, training.rank),
    }  # fmt: skip
    if not work.needs:
        del steps["score"]
    if work.critic is not None:
        steps["value"] = stepped("value", work.critic, training.critic_rank)
    return steps
