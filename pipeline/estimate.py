"""What an iteration will take, reckoned from its experiment alone: bytes, memory, operations, seconds. Arithmetic only.

Every number is of one of three kinds, and says so: counted (bytes of columns, of tensors), bounded from below (memory
that nobody can do without), or guessed at by a share of a device's peak that others reach (seconds).

P: parameters, N: tokens of an iteration's responses, Q: of their prompts, G: devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

FLOAT = INT = 4
"""Bytes of a number in a column, a weight or a moment in float32."""
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
ACTIVATIONS = 34
"""Bytes per token, layer and unit of width that a backward pass keeps in half precision (arXiv:2205.05198, eq. 1,
without the square of the sequence, which no attention here writes down); twice in float32."""
RECOMPUTED = FLOAT
"""Bytes per token, layer and unit of width that stay where activations are recomputed: each layer's input."""
SEQUENCES = 256
"""Responses that one engine decodes at once, at most."""
FILLED = 0.9
"""Share of a device's memory that an engine takes."""


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


DEVICES: Mapping[str, Device] = {
    "a100": Device(80e9, 312e12, 19.5e12, 2.0e12, 0.01),
    "h100": Device(80e9, 989e12, 67e12, 3.35e12, 0.01),
    "h200": Device(141e9, 989e12, 67e12, 4.8e12, 0.01),
    "core": Device(8e9, 5e10, 5e10, 1e10, 0.02, 5e8),
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

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From the `config.json` of a llama-like model. Raises `KeyError` for one that is not."""
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"], config["hidden_size"], heads, config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads, config["intermediate_size"],
            config["vocab_size"], bool(config.get("tie_word_embeddings", False)),
        )  # fmt: skip

    @property
    def parameters(self) -> int:
        """Weights of embedding, attention, feed-forward layers, norms and head.

        P = V w (1 or 2) + L (w h_q d + 2 w h_kv d + h_q d w + 3 w f + 2 w) + w
        """
        attention = 2 * self.width * self.head * (self.heads + self.kv_heads)
        layer = attention + 3 * self.width * self.hidden + 2 * self.width
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.layers * layer + self.width

    def adapters(self, rank: int) -> int:
        """Weights of low-rank adapters of all linear layers: rank (in + out) of each."""
        attention = 4 * self.width + 2 * self.head * (self.heads + self.kv_heads)
        return self.layers * rank * (attention + 3 * (self.width + self.hidden))

    @property
    def cache(self) -> int:
        """Bytes of keys and values per token, in half precision."""
        return 2 * 2 * self.layers * self.kv_heads * self.head


@dataclass(frozen=True)
class Work:
    """An iteration's rows, and what the recipe asks for of them."""

    responses: int
    prompt_tokens: int
    """Of a prompt, at most."""
    response_tokens: float
    """Of a response, on average."""
    needs: int
    """Columns that models fill before the update."""
    epochs: int
    critic: bool

    @property
    def tokens(self) -> float:
        """N: of all responses."""
        return self.responses * self.response_tokens

    @property
    def read(self) -> float:
        """Q + N: of prompts and responses, as a forward pass reads them."""
        return self.responses * (self.prompt_tokens + self.response_tokens)


@dataclass(frozen=True)
class Training:
    """How models are trained and read with."""

    micro_batch: int
    """Tokens at once."""
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

    def activations(self, shape: Shape) -> float:
        """Bytes that a backward pass over a micro-batch keeps: of all layers, or of one and the inputs of all."""
        layer = ACTIVATIONS * (1 if self.half else 2)
        kept = layer + RECOMPUTED * shape.layers if self.recompute else layer * shape.layers
        return float(kept * self.micro_batch * shape.width)


@dataclass(frozen=True)
class Step:
    """What a stage takes in an iteration."""

    written: float
    """Bytes of the artifact, before compression: an upper bound."""
    seconds: float
    """At the shares of the peak that stand above."""
    memory: float
    """Bytes on each device: weights and what training keeps of them, a lower bound; activations of a micro-batch."""


def checkpoint(shape: Shape, rank: int | None = None) -> float:
    """Bytes of weights, 4 P, and of AdamW's moments, 8 P; 12 A, with A weights of adapters, in place of these."""
    return float(FLOAT * (3 * shape.parameters if rank is None else shape.parameters + 3 * shape.adapters(rank)))


def trained(shape: Shape, rank: int | None = None, *, offload: bool = False) -> float:
    """Bytes of weights, gradients and two moments: 16 P; 4 P + 16 A where A weights of adapters are trained instead.

    With the moments in the host's memory 8 P, or 4 P + 8 A.
    """
    each = 2 if offload else 4
    return float(FLOAT * (each * shape.parameters if rank is None else shape.parameters + each * shape.adapters(rank)))


def iteration(shape: Shape, work: Work, device: Device, count: int, training: Training, dtype: int) -> dict[str, Step]:
    """Stage -> what it takes with `count` devices; `dtype` is the sampler's bytes per weight.

    rollout    steps x (weights + keys and values) / bandwidth, in waves of as many responses as fit into memory
    score      2 P (Q + N) operations per column
    update     6 P (Q + N) operations per epoch, 8 P with activations recomputed; a critic as much again
    """
    weights, kept = shape.parameters * FLOAT, TABLE + ROW * work.responses
    engines = max(1, min(count, work.responses))
    whole = (work.prompt_tokens + work.response_tokens) * shape.cache
    fitting = max(1, int((FILLED * device.memory - shape.parameters * dtype) // whole))
    at_once = min(SEQUENCES, -(-work.responses // engines), fitting)
    waves = -(-work.responses // (engines * at_once))
    held = at_once * (work.prompt_tokens + work.response_tokens / 2) * shape.cache
    one = max(device.step, (shape.parameters * dtype + held) / (device.bandwidth * DECODED_AT))
    decode = waves * work.response_tokens * one
    speed = count * (device.flops if training.half else device.flops32) * TRAINED_AT
    token_row = kept + work.responses * work.prompt_tokens * INT
    forward = 2 * shape.parameters * work.read / speed
    update = (4 if training.recompute else 3) * forward * work.epochs

    def stepped(rank: int | None) -> Step:
        saved = checkpoint(shape, rank)
        held = trained(shape, rank, offload=training.offload) / count
        return Step(saved, update + saved / device.storage, held + training.activations(shape))

    steps = {
        "rollout": Step(
            token_row + work.tokens * (INT + FLOAT + TEXT), decode + weights / device.storage,
            shape.parameters * dtype + at_once * whole,
        ),
        "label": Step(kept, 0.0, 0.0),
        "score": Step(kept + work.tokens * FLOAT * work.needs, work.needs * forward, weights / count),
        "advantage": Step(token_row + work.tokens * (2 * INT + FLOAT * (1 + work.needs)), 0.0, 0.0),
        "update": stepped(training.rank),
    }  # fmt: skip
    if not work.needs:
        del steps["score"]
    if work.critic:
        steps["value"] = stepped(training.critic_rank)
    return steps
