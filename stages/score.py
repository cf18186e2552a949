"""rollouts (, labels) -> scores: forward passes over finished text; the columns that a recipe asks models for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field
from torch import nn

from pipeline import ragged
from pipeline.algorithms.bind import bind
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import LABELS, POLICY, ROLLOUTS, SCORES
from pipeline.errors import ContractError, InputError, NumericsError
from pipeline.experiment import Experiment
from pipeline.metrics import console
from pipeline.models import checkpoint
from pipeline.models.device import device
from pipeline.models.forward import response_logprobs
from pipeline.stage import StageSettings, stage
from pipeline.training.batches import micro_batches

Need = Literal["old_logprobs", "ref_logprobs"]
MODEL_OF: dict[str, str] = {"old_logprobs": "policy", "ref_logprobs": "reference"}
"""Column -> the input that fills it."""


class Settings(StageSettings):
    """Which columns, at which temperature."""

    needs: tuple[Need, ...]
    """Columns to write. A recipe that needs none has nothing to score."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampling: log-probabilities are of the distribution that was sampled from."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens that fit into memory at once."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The needs of the recipe; its sampling temperature."""
        return {
            "needs": tuple(name for name in MODEL_OF if name in bind(experiment.recipe).needs),
            "temperature": experiment.recipe.rollout.temperature,
            "micro_batch_tokens": experiment.resources.micro_batch_tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What to read (all rows, or those that labels keep), and who reads it."""

    rollouts: Annotated[tuple[Artifact, ...], ROLLOUTS]
    labels: Annotated[tuple[Artifact, ...] | None, LABELS] = None
    policy: Annotated[Artifact | None, POLICY] = None
    reference: Annotated[Artifact | None, POLICY] = None


def kept_rows(rollouts: Sequence[Artifact], labels: Sequence[Artifact]) -> Iterator[pa.Table]:
    """Parts of the rollouts without the rows that labels drop.

    Raises `ContractError` when labels are of other rollouts.
    """
    if not labels:
        for artifact in rollouts:
            yield from artifact.parts()
        return
    if len(rollouts) != len(labels):
        raise ContractError(f"{len(rollouts)} rollouts but {len(labels)} labels", do="name both once per round")
    key = ["prompt_id", "sample"]
    for artifact, label in zip(rollouts, labels, strict=True):
        for part, marks in zip_longest(artifact.parts(), label.parts()):
            if part is None or marks is None or part.select(key) != marks.select(key):
                raise ContractError("the labels are of other rollouts", f"{label.path} and {artifact.path}")
            yield part.filter(marks["keep"])


def logprobs_of(model: nn.Module, part: pa.Table, temperature: float, budget: int) -> pa.ListArray:
    """Log-probability (nat) of every response token under `model`, rows in the order of `part`."""
    prompts, responses = part["prompt_tokens"].to_pylist(), part["response_tokens"].to_pylist()
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    rows: list[np.ndarray] = [np.empty(0, np.float32)] * len(responses)
    done = 0
    for micro in micro_batches(np.arange(len(responses)), lengths, budget):
        with torch.no_grad():
            read = response_logprobs(
                model, [prompts[i] for i in micro], [responses[i] for i in micro], temperature=temperature
            )
        values = read.logprobs.float().cpu().numpy()
        for place, row in enumerate(micro):
            rows[row] = values[place, : len(responses[row])]
        done += len(micro)
        console.progress(f"read {done}/{len(responses)} responses")
    return ragged.from_rows(rows, pa.float32())


def mismatch(sampler: pa.ChunkedArray, trainer: pa.ListArray) -> dict[str, tuple[float, str]]:
    """How far the engine's log-probabilities are from the training stack's, over tokens.

    d = sampler - trainer;   mean d estimates KL(sampler || trainer);   the ratio trainer / sampler is exp(-d)
    """
    known = pc.is_valid(sampler)
    if not pc.any(known).as_py():
        return {}
    theirs = sampler.filter(known).combine_chunks().flatten().to_numpy().astype(np.float64)
    d = theirs - trainer.filter(known.combine_chunks()).flatten().to_numpy()
    outside = (np.abs(d) > np.log(2)).mean()
    return {
        "kl/sampler": (float(d.mean()), "nat"),
        "kl/sampler_max": (float(np.abs(d).max()), "nat"),
        "kl/sampler_outside": (float(outside), "fraction"),
    }


@stage(writes=SCORES, version=1, hardware="gpu")
def score(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Read the kept responses with the models that the recipe asks for."""
    if not settings.needs:
        raise InputError("the recipe asks no model to read responses", do="go on with `advantage`, without --scores")
    parts = [part for part in kept_rows(inputs.rollouts, inputs.labels or ()) if part.num_rows]
    if not parts:
        raise ContractError("no rows are kept: there is nothing to score", str(inputs.rollouts[0].path))
    columns: list[dict[str, Any]] = [{"prompt_id": p["prompt_id"], "sample": p["sample"]} for p in parts]
    for need in settings.needs:
        given: Artifact | None = getattr(inputs, MODEL_OF[need])
        if given is None:
            raise InputError(f"{need} needs a {MODEL_OF[need]}", do=f"name it: --{MODEL_OF[need]} PATH")
        checkpoint.inspect(given.path)
        model = checkpoint.load_policy(given.path, "float32").to(device())
        for part, filled in zip(parts, columns, strict=True):
            filled[need] = logprobs_of(model, part, settings.temperature, settings.micro_batch_tokens)
        del model
    for index, filled in enumerate(columns):
        out.write(index, pa.table(filled))
    _measure(parts, columns, out)


def _measure(parts: Sequence[pa.Table], columns: Sequence[Mapping[str, Any]], out: Outbox) -> None:
    if "old_logprobs" not in columns[0]:
        return
    sampler = pa.concat_tables([part.select(["sampler_logprobs"]) for part in parts])["sampler_logprobs"]
    trainer = pa.concat_arrays([filled["old_logprobs"] for filled in columns])
    numbers = mismatch(sampler, trainer)
    for name, (value, unit) in numbers.items():
        out.metrics.add(name, value, unit)
    out.stats |= {name: value for name, (value, _) in numbers.items()}
    if not all(np.isfinite(value) for value, _ in numbers.values()):
        raise NumericsError("the engine's log-probabilities are not finite", str(out.target))


if __name__ == "__main__":
    score.main()
