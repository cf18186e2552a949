"""documents, policy -> perplexities: how well a policy still predicts plain text, document by document."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import nn

from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import DOCUMENTS, PERPLEXITIES, POLICY
from pipeline.experiment import Experiment
from pipeline.metrics import console
from pipeline.models import checkpoint
from pipeline.models.distributed import shard
from pipeline.models.forward import packs, response_logprobs
from pipeline.models.precision import computing
from pipeline.stage import ModelSettings, stage
from pipeline.text import Chat
from pipeline.training.batches import micro_batches
from pipeline.training.imitation import Example, windows


class Settings(ModelSettings):
    """How documents are read."""

    document_tokens: int = Field(1024, ge=2)
    """Longer documents are cut into windows of so many tokens, as where they are mixed into training."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Lengths from `scale`."""
        return {
            "document_tokens": experiment.scale.prompt_tokens + experiment.scale.response_tokens,
            **cls.computing(experiment),
        }


@dataclass(frozen=True)
class Inputs:
    """What is read, and who reads it."""

    documents: Annotated[Artifact, DOCUMENTS]
    policy: Annotated[Artifact, POLICY]


@dataclass(frozen=True)
class Predicted:
    """How a policy predicted D documents."""

    document_ids: Sequence[str]
    tokens: Int[np.ndarray, " D"]
    """Predicted tokens of each."""
    nll: Float[np.ndarray, " D"]
    """Sum over them of -log p, in nat."""

    @property
    def loss(self) -> float:
        """Mean over all tokens: L = sum_d nll_d / sum_d n_d. [nat/token]"""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def error(self) -> float:
        """Standard error of the loss, documents being independent; NaN for a single one.

        se = sqrt(D / (D - 1) sum_d (nll_d - L n_d)^2) / sum_d n_d               (a ratio estimator, linearized)
        """
        count = len(self.tokens)
        if count < 2:
            return float("nan")
        excess = self.nll - self.loss * self.tokens
        return float(np.sqrt(count / (count - 1) * (excess**2).sum()) / self.tokens.sum())


def read(model: nn.Module, examples: Sequence[Example], budget: int) -> Iterator[tuple[int, float]]:
    """Number of every window, and the sum over its tokens of -log p at temperature 1; longest first."""
    lengths = np.array([len(example.prompt) + len(example.targets) for example in examples], dtype=np.int64)
    cut = micro_batches(np.arange(len(examples)), lengths, budget, packed=packs(model))
    for done, rows in enumerate(cut):
        chosen = [examples[row] for row in rows]
        with torch.no_grad():
            found = response_logprobs(model, [e.prompt for e in chosen], [e.targets for e in chosen])
        yield from zip(rows.tolist(), (-found.logprobs.double().sum(dim=1)).tolist(), strict=True)
        console.progress(f"read {done + 1} batches of documents")


def predicted(model: nn.Module, documents: Sequence[Mapping[str, Any]], chat: Chat, settings: Settings) -> Predicted:
    """Every document that has a token to predict, in the order of the rows. Raises `ContractError` when none has."""
    examples = windows(documents, chat, settings.document_tokens)
    names = list(dict.fromkeys(example.name for example in examples))
    place = {name: row for row, name in enumerate(names)}
    tokens, nll = np.zeros(len(names), dtype=np.int64), np.zeros(len(names))
    for window, total in sorted(read(model, examples, settings.micro_batch_tokens)):
        row = place[examples[window].name]
        tokens[row] += len(examples[window].targets)
        nll[row] += total
    return Predicted([name.removeprefix("document ") for name in names], tokens, nll)


@stage(writes=PERPLEXITIES, version=1, hardware="gpu")
def perplexity(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Measure how well a policy still predicts plain text."""
    place = inputs.policy.path
    checkpoint.inspect(place)
    model = shard(computing(checkpoint.load_policy(place, "float32"), settings.compute_dtype))
    documents = inputs.documents.table(["document_id", "text"]).to_pylist()
    found = predicted(model, documents, Chat(place), settings)
    out.write(
        0, pa.table({"document_id": found.document_ids, "tokens": found.tokens.astype(np.int32), "nll": found.nll})
    )
    rejected = len(documents) - len(found.tokens)
    if rejected:
        out.say(f"{rejected} documents have no token to predict and are left out")
    out.stats |= {"rejected": rejected, "loss/documents": found.loss, "tokens": float(found.tokens.sum())}
    out.metrics.add("rows/rejected", rejected, "rows")
    out.metrics.add("loss/documents", found.loss, "nat")
    if len(found.tokens) > 1:
        out.stats["loss/documents_error"] = found.error
        out.metrics.add("loss/documents_error", found.error, "nat")
    out.metrics.add("perplexity", float(np.exp(found.loss)))


if __name__ == "__main__":
    perplexity.main()
