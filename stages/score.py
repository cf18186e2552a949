"""rollouts (, labels) -> scores: forward passes over finished text; the columns that a recipe asks models for.

A recipe that is labelled by a reward model asks twice: for `reward_scores` of all rows before `label`, and for the
other columns of the rows that are kept after it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline import ragged
from pipeline.algorithms.bind import bind
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import CRITIC, LABELS, POLICY, REWARD_MODEL, ROLLOUTS, SCORES
from pipeline.disk import FileIdentity
from pipeline.errors import ArtifactError, ContractError, InputError, NumericsError
from pipeline.experiment import Experiment
from pipeline.metrics import console
from pipeline.models import checkpoint
from pipeline.models.abreast import large
from pipeline.models.device import give_back
from pipeline.models.distributed import shard, together
from pipeline.models.forward import packs, response_logprobs, response_scores, response_values
from pipeline.models.precision import computing
from pipeline.packing import numbered
from pipeline.ranks import count
from pipeline.shards import spread
from pipeline.stage import ModelSettings, stage
from pipeline.text import Chat
from pipeline.training.batches import Rows, micro_batches
from pipeline.training.policies import Numbers, divergence, mismatch

Need = Literal["old_logprobs", "ref_logprobs", "values", "reward_scores"]
MODEL_OF: dict[str, str] = {
    "old_logprobs": "policy", "ref_logprobs": "reference", "values": "critic", "reward_scores": "reward_model"
}  # fmt: skip
"""Column -> the input that fills it."""

KIND_OF: dict[str, checkpoint.Kind] = {"values": "critic", "reward_scores": "reward_model"}
"""Column -> what the model is where it is no policy."""

BEFORE_LABEL = "reward_scores"
"""The column that labelers read: asked for by name, before there are labels."""

SHARD = 512
"""Responses that a worker reads at a time, where several share the work."""

Tokens = Sequence[Sequence[int]]
Reader = Callable[[nn.Module, Tokens, Tokens], Tensor]
"""From model, prompts and responses to a number per response token [B T] or per response [B]."""


class Settings(ModelSettings):
    """Which columns, at which temperature."""

    needs: tuple[Need, ...]
    """Columns to write. A recipe that needs none has nothing to score."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits: that of the sampling makes log-probabilities of the distribution that was sampled from."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What the recipe needs once there are labels; the temperature of its log-probabilities."""
        needs = bind(experiment.recipe).needs - {BEFORE_LABEL}
        return {
            "needs": tuple(name for name in MODEL_OF if name in needs),
            "temperature": experiment.recipe.temperature,
            **cls.computing(experiment),
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What to read (all rows, or those that labels keep), and who reads it."""

    rollouts: Annotated[tuple[Artifact, ...], ROLLOUTS]
    labels: Annotated[tuple[Artifact, ...] | None, LABELS] = None
    policy: Annotated[Artifact | None, POLICY] = None
    reference: Annotated[Artifact | None, POLICY] = None
    critic: Annotated[Artifact | None, CRITIC] = None
    reward_model: Annotated[Artifact | None, REWARD_MODEL] = None


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


def refuse_another_tokenizer(rollouts: Sequence[Artifact], given: Artifact, name: str) -> None:
    """Raise `ContractError` where rollouts say that their tokens are another tokenizer's than that of model `name`.

    Rollouts that do not say, because they were adopted from elsewhere, pass.
    """
    paths = [path for artifact in rollouts for path in artifact.part_paths()]
    digests = {path: (pq.read_schema(path).metadata or {}).get(b"tokenizer_digest", b"").decode() for path in paths}
    if not any(digests.values()):
        return
    own = Chat(given.path).metadata()["tokenizer_digest"]
    for path, digest in digests.items():
        if digest not in ("", own):
            raise ContractError(
                f"the {name} has another tokenizer ({own}) than the rollouts ({digest}): it would read other text",
                f"{given.path} and {path}",
                f"name a {name} with the tokenizer of the policy that sampled; where the tokens are the same and only "
                "the tokenizer's files differ, copy those of that policy",
            )


def refuse_foreign(parts: Sequence[pa.Table], vocab_size: int, given: Artifact) -> None:
    """Raise `ArtifactError` where the rollouts hold tokens that a model with `vocab_size` of them does not know."""
    flat = (pc.list_flatten(part[name]) for part in parts for name in ("prompt_tokens", "response_tokens"))
    largest = max(pc.max(tokens).as_py() for tokens in flat)
    if largest >= vocab_size:
        raise ArtifactError(
            f"the rollouts hold token id {largest}, and the model knows {vocab_size} tokens", str(given.path),
            "name a model with the tokenizer of the policy that sampled",
        )  # fmt: skip


def read(model: nn.Module, reader: Reader, part: pa.Table, budget: int) -> pa.Array:
    """What `reader` makes of every response with `model`, rows in the order of `part`.

    A list of the response's length per row, or a number, as the reader answers [B T] or [B].
    """
    prompts, responses = part["prompt_tokens"].to_pylist(), part["response_tokens"].to_pylist()
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    rows: list[np.ndarray] = [np.empty(0, np.float32)] * len(responses)
    done = 0

    def numbers_of(micro: Rows) -> np.ndarray:
        with torch.no_grad():
            found = reader(model, [prompts[i] for i in micro], [responses[i] for i in micro])
        return found.float().cpu().numpy()

    cut = micro_batches(
        np.arange(len(responses)), lengths, budget, packed=packs(model), groups=numbered(prompts)
    )  # fmt: skip
    for micro, numbers in together(list(cut), numbers_of, model):
        for place, row in enumerate(micro):
            rows[row] = numbers[place, : len(responses[row])] if numbers.ndim == 2 else numbers[place]
        done += len(micro)
        console.progress(f"read {done}/{len(responses)} responses")
    return pa.array(rows, pa.float32()) if np.ndim(rows[0]) == 0 else ragged.from_rows(rows, pa.float32())


def location(name: str, numbers: np.ndarray) -> Numbers:
    """Mean and standard deviation (by n)."""
    return {f"{name}/mean": (float(numbers.mean()), "reward"), f"{name}/std": (float(numbers.std()), "reward")}


def length_correlation(scores: np.ndarray, lengths: np.ndarray) -> Numbers:
    """Pearson's correlation of score and response length; nothing where either does not vary."""
    if np.ptp(scores) == 0 or np.ptp(lengths) == 0:
        return {}
    return {"reward_scores/length_correlation": (float(np.corrcoef(scores, lengths)[0, 1]), "")}


def cut(part: pa.Table) -> list[pa.Table]:
    """The part in shards of `SHARD` responses."""
    return [part.slice(start, SHARD) for start in range(0, part.num_rows, SHARD)]


@dataclass
class Reading:
    """Fills a column, part by part."""

    need: Need
    model_at: Path
    settings: Settings

    @cached_property
    def model(self) -> tuple[nn.Module, Reader]:
        """Who fills the column, and how."""
        which = checkpoint.identities(self.model_at)
        known, model = _small.pop(self.need, (None, None))
        if model is None or known != which:
            model = self._loaded()
        if count() == 1 and not large(model):
            _small[self.need] = which, model
        return shard(computing(model, self.settings.compute_dtype)), self._reader()

    def _loaded(self) -> Any:
        if self.need == "values":
            return checkpoint.load_critic(self.model_at, "float32")
        if self.need == "reward_scores":
            return checkpoint.load_reward_model(self.model_at, "float32")
        return checkpoint.load_policy(self.model_at, "float32")

    def _reader(self) -> Reader:
        if self.need == "values":
            return lambda model, prompts, responses: response_values(model, prompts, responses).values
        if self.need == "reward_scores":
            return response_scores
        reader = partial(response_logprobs, temperature=self.settings.temperature)
        return lambda model, prompts, responses: reader(model, prompts, responses).logprobs

    def __call__(self, part: pa.Table) -> pa.Array:
        """The column of a part."""
        return read(*self.model, part, self.settings.micro_batch_tokens)

    def rest(self) -> None:
        """Drop the model unless it is small, and leave its memory to whoever computes next on this device."""
        vars(self).pop("model", None)
        give_back()


_small: dict[str, tuple[tuple[FileIdentity, ...], nn.Module]] = {}
"""Column -> the files of the model that filled it last, and the model: a reference is the same in each iteration."""


@stage(writes=SCORES, version=1, hardware="gpu", ranks=True, shards=True)
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
            name = MODEL_OF[need]
            raise InputError(f"{need} needs a {name}", do=f"name it: --{name.replace('_', '-')} PATH")
        facts = checkpoint.inspect(given.path, KIND_OF.get(need, "policy"))
        refuse_another_tokenizer(inputs.rollouts, given, MODEL_OF[need].replace("_", " "))
        refuse_foreign(parts, facts.vocab_size, given)
        reading = Reading(need, given.path, settings)
        texts = (part.select(["prompt_tokens", "response_tokens"]) for part in parts)
        for filled, pieces in zip(columns, spread(reading, texts, cut, [given.path]), strict=True):
            filled[need] = pa.concat_arrays(pieces)
    for index, filled in enumerate(columns):
        out.write(index, pa.table(filled))
    _measure(parts, columns, out)


def _measure(parts: Sequence[pa.Table], columns: Sequence[Mapping[str, Any]], out: Outbox) -> None:
    whole = {name: pa.concat_arrays([filled[name] for filled in columns]) for name in columns[0] if name in MODEL_OF}
    numbers: Numbers = {}
    if "old_logprobs" in whole:
        sampler = pa.concat_tables([part.select(["sampler_logprobs"]) for part in parts])["sampler_logprobs"]
        numbers |= mismatch(sampler, whole["old_logprobs"])
        if not all(np.isfinite(value) for value, _ in numbers.values()):
            raise NumericsError("the engine's log-probabilities are not finite", str(out.target))
        if "ref_logprobs" in whole:
            numbers |= divergence(whole["old_logprobs"], whole["ref_logprobs"])
    if "values" in whole:
        numbers |= location("value", whole["values"].flatten().to_numpy())
    if "reward_scores" in whole:
        scores = whole["reward_scores"].to_numpy()
        lengths = np.concatenate([pc.list_value_length(part["response_tokens"]).to_numpy() for part in parts])
        numbers |= location("reward_scores", scores) | length_correlation(scores, lengths)
    for name, (value, unit) in numbers.items():
        out.metrics.add(name, value, unit)
    out.stats |= {name: value for name, (value, _) in numbers.items()}


if __name__ == "__main__":
    score.main()
