"""Gates: after each stage of the loop its numbers are looked at before the next stage may use what it made.

A gate reads one number that the stage left in the manifest, so it costs nothing to ask again when a run resumes. Where
it fails, the run stops with the five worst rows, or says so and goes on (`warn`), as the experiment's `[gates]` choose.
Whatever it looked at is committed and stays readable. Numbers that no dataset may have at all (not finite, a
log-probability above zero, lists of unequal length) never get so far: `contract.check` refuses to write them.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flows.run import Run
from pipeline import ragged
from pipeline.artifacts import Artifact
from pipeline.errors import GateError
from pipeline.experiment import Gates
from pipeline.wellformed import malformed

WORST = 5
"""Rows that an error shows."""

SHOWN = 100
"""Characters of a response that it shows."""

Rows = list[tuple[float, str, int]]
"""What is bad about a row, the larger the worse; its prompt and sample."""


@dataclass(frozen=True)
class Gate:
    """One number, and where it has to be."""

    name: str
    """Of the setting with its action; `NAME_most` or `NAME_least` is the limit, and 0 at most where there is none."""
    kinds: tuple[str, ...]
    """Contracts of the artifacts that it looks at."""
    number: str
    """Name among the manifest's stats."""
    says: str
    """What it means when it fails."""
    do: str
    """What to type next."""
    bad: Callable[[Artifact, Sequence[Artifact]], Iterable[tuple[float, str, int]]]
    """The rows of the artifact, with how bad each is; the rollouts that it is about are given beside it."""

    def limit(self, gates: Gates) -> tuple[float, int]:
        """The limit, and 1 where the number must not be above it or -1 where not below."""
        if (least := getattr(gates, f"{self.name}_least", None)) is not None:
            return least, -1
        return getattr(gates, f"{self.name}_most", 0.0), 1

    def failure(self, artifact: Artifact, gates: Gates) -> str | None:
        """What to say of the artifact; None where it is well, where nothing is known, and where the gate is off."""
        value = artifact.stats.get(self.number)
        if getattr(gates, self.name) == "off" or value is None:
            return None
        limit, side = self.limit(gates)
        if side * value <= side * limit:
            return None
        return (
            f"gate {self.name}: {self.says}: {self.number} = {value:.4g}, {'most' if side > 0 else 'least'} {limit:g}"
        )


def look(run: Run, artifact: Artifact, rollouts: Sequence[Artifact]) -> None:
    """Ask the gates of an artifact that is about `rollouts`. Raises `GateError` where one fails that stops."""
    gates = run.experiment.gates
    for gate in GATES:
        if artifact.contract.name not in gate.kinds or (failure := gate.failure(artifact, gates)) is None:
            continue
        if gate.name == "mismatch" and any(one.manifest.settings.get("staleness") for one in rollouts):
            continue  # those are policies apart, and not only the same one in engine and trainer
        if getattr(gates, gate.name) == "warn":
            run.say(f"  {failure}")
            continue
        rows = worst(gate.bad(artifact, rollouts), rollouts)
        raise GateError(
            "\n".join([failure, *(["the worst rows:", *rows] if rows else [])]), str(artifact.path),
            f"{gate.do}; or go on regardless: the same command with --set gates.{gate.name}=warn",
        )  # fmt: skip


def failures(artifacts: Iterable[Artifact], gates: Gates, names: Sequence[str]) -> list[str]:
    """What these gates say of the artifacts, warnings and stops alike."""
    asked = [gate for gate in GATES if gate.name in names]
    found = (gate.failure(one, gates) for one in artifacts for gate in asked if one.contract.name in gate.kinds)
    return [failure for failure in found if failure is not None]


def worst(rows: Iterable[tuple[float, str, int]], rollouts: Sequence[Artifact]) -> list[str]:
    """A line for each of the worst rows: its key, how bad it is, how its response begins."""
    taken = sorted(rows, key=lambda row: (-row[0], row[1], row[2]))[:WORST]
    texts = responses({(prompt_id, sample) for _, prompt_id, sample in taken}, rollouts)
    return [f"  {key}/{sample}  {bad:+.4g}  {shown(texts[key, sample])}" for bad, key, sample in taken]


def responses(wanted: set[tuple[str, int]], rollouts: Sequence[Artifact]) -> Mapping[tuple[str, int], str]:
    """The texts of some rows."""
    ids = pa.array(sorted({prompt_id for prompt_id, _ in wanted}), pa.string())
    texts: dict[tuple[str, int], str] = {}
    for artifact in rollouts:
        for part in artifact.parts(["prompt_id", "sample", "response"]):
            found = part.filter(pc.is_in(part["prompt_id"], ids)).to_pylist()
            texts |= {(row["prompt_id"], row["sample"]): row["response"] for row in found}
    return texts


def shown(text: str) -> str:
    """How a response begins, on one line."""
    return json.dumps(text[:SHOWN], ensure_ascii=False) + "..." * (len(text) > SHOWN)


def _keyed(table: pa.Table, bad: Iterable[float], chosen: np.ndarray | None = None) -> Rows:
    rows = zip(bad, table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
    return [row for index, row in enumerate(rows) if chosen is None or chosen[index]]


def _malformed(artifact: Artifact, _: Sequence[Artifact]) -> Rows:
    rows: Rows = []
    for part in artifact.parts():
        rows += _keyed(part, ragged.lengths(part["response_tokens"]).tolist(), malformed(part))
    return rows


def _cut(artifact: Artifact, _: Sequence[Artifact]) -> Rows:
    table = artifact.table(["prompt_id", "sample", "response_tokens", "finish"])
    chosen = pc.equal(table["finish"], "length").to_numpy(zero_copy_only=False)
    return _keyed(table, ragged.lengths(table["response_tokens"]).tolist(), chosen)


def _repeated(artifact: Artifact, _: Sequence[Artifact]) -> Rows:
    """The first response of each group, by how often it or another one is repeated."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for row in artifact.table(["prompt_id", "sample", "response_tokens"]).to_pylist():
        if row["sample"] >= 0:
            groups.setdefault(row["prompt_id"], []).append(tuple(row["response_tokens"]))
    return [(float(len(tokens) - len(set(tokens))), prompt_id, 0) for prompt_id, tokens in groups.items()]


def _not_graded(artifact: Artifact, rollouts: Sequence[Artifact]) -> Rows:
    """Rows without a verdict, the longest first: those are what graders hang on."""
    table = artifact.table(["prompt_id", "sample", "verdict"])
    lost = pc.is_in(table["verdict"], pa.array(["timeout", "error"])).to_numpy(zero_copy_only=False)
    rows = _keyed(table, np.zeros(table.num_rows).tolist(), lost)
    texts = responses({(prompt_id, sample) for _, prompt_id, sample in rows}, rollouts)
    return [(float(len(texts[prompt_id, sample])), prompt_id, sample) for _, prompt_id, sample in rows]


def _without_spread(artifact: Artifact, _: Sequence[Artifact]) -> Rows:
    """The first response of each group whose rewards are all the same; what it got, turned round: the lowest first."""
    groups: dict[str, list[float]] = {}
    for row in artifact.table(["prompt_id", "sample", "reward"]).to_pylist():
        if row["sample"] >= 0:
            groups.setdefault(row["prompt_id"], []).append(row["reward"])
    return [(-rewards[0], prompt_id, 0) for prompt_id, rewards in groups.items() if len(set(rewards)) == 1]


def _apart(artifact: Artifact, rollouts: Sequence[Artifact]) -> Rows:
    """Mean over a response's tokens of |sampler - trainer|; an update that measured it has no rows."""
    if artifact.contract.name == "policy":
        return []
    trainer = _listed([artifact], "old_logprobs")
    return [
        (float(np.abs(np.subtract(sampler, trainer[key])).mean()), *key)
        for key, sampler in _listed(rollouts, "sampler_logprobs").items()
        if key in trainer and sampler
    ]


def _far(artifact: Artifact, _: Sequence[Artifact]) -> Rows:
    """Sum over a response's tokens of policy - reference; an update that measured it has no rows."""
    if artifact.contract.name == "policy":
        return []
    reference = _listed([artifact], "ref_logprobs")
    old = _listed([artifact], "old_logprobs")
    return [(float(np.subtract(old[key], reference[key]).sum()), *key) for key in old]


def _sure(_: Artifact, rollouts: Sequence[Artifact]) -> Rows:
    """Mean log-probability of a response's tokens: the surest first."""
    return [
        (float(np.mean(sampler)), *key) for key, sampler in _listed(rollouts, "sampler_logprobs").items() if sampler
    ]


def _listed(artifacts: Sequence[Artifact], column: str) -> Mapping[tuple[str, int], Any]:
    tables = [artifact.table(["prompt_id", "sample", column]) for artifact in artifacts]
    rows = (row for table in tables for row in table.to_pylist())
    return {(row["prompt_id"], row["sample"]): row[column] for row in rows}


GATES = (
    Gate(
        "malformed", ("rollouts",), "rows/malformed", "responses whose end tokens do not fit how they finished",
        "look at them with `rlhf show`: is the tokenizer the policy's own?", _malformed,
    ),
    Gate(
        "truncation", ("rollouts",), "length/cut", "too many responses are cut at the length limit",
        "raise scale.response_tokens, or shape the reward with overlong_penalty", _cut,
    ),
    Gate(
        "duplicates", ("rollouts",), "duplicates/in_group", "the responses to a prompt are nearly all the same",
        "sample at a higher temperature, lower scale.learning_rate, or stop here", _repeated,
    ),
    Gate(
        "grader_failures", ("labels",), "grader/failures", "the grader did not get through too many responses",
        "raise resources.grader_seconds, and make the labels again: `rlhf redo RUN label --iteration I --set "
        "grader_seconds=20`", _not_graded,
    ),
    Gate(
        "zero_spread", ("labels",), "reward/zero_spread_groups", "too many groups have one reward for all responses",
        "take prompts of another difficulty, or filter with mixed_outcomes", _without_spread,
    ),
    Gate(
        "mismatch", ("scores", "policy"), "kl/sampler_abs", "engine and trainer see different policies",
        "look whether engine and trainer read the same checkpoint, tokenizer and dtype (resources.dtype)", _apart,
    ),
    Gate(
        "divergence", ("scores", "policy"), "kl/reference_sum", "the policy has gone too far from the reference",
        "raise the coefficient of kl_penalty, or lower scale.learning_rate", _far,
    ),
    Gate(
        "entropy", ("policy",), "entropy/mean", "the policy has become too sure of every token",
        "lower scale.learning_rate, or raise clip_high", _sure,
    ),
)  # fmt: skip
"""All of them, in the order of the stages. `reward_hacking` compares iterations: see hacking.py."""
