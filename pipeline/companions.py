"""Responses together with what they answer and what was made of them: prompts, labels, advantages, row by row."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.artifacts import Artifact, place_of
from pipeline.catalog import is_redone, lies_at
from pipeline.errors import ArtifactError, ContractError
from pipeline.storage import MANIFEST
from pipeline.text import Chat

KEY = ["prompt_id", "sample"]


@dataclass(frozen=True)
class Companions:
    """Responses with what they answer, and what was made of them: all found by digest, near the artifact."""

    rollouts: Artifact
    prompts: Artifact
    labels: Artifact | None
    advantages: Artifact | None

    @classmethod
    def of(cls, artifact: Artifact) -> "Companions":
        """Of rollouts: their labels and advantages in the same directory. Of labels: their rollouts."""
        beside = [Artifact.open(path.parent) for path in sorted(artifact.path.absolute().parent.glob(f"*/{MANIFEST}"))]
        beside = [one for one in beside if not is_redone(one.path)]
        labels: Artifact | None = artifact
        rollouts = artifact
        if artifact.manifest.kind == "labels":
            rollouts = _parent(artifact, "rollouts")
        else:
            labels = next((one for one in beside if _made_of(one, "labels", rollouts)), None)
        asked = next((one for one in (rollouts, labels) if one is not None and "prompts" in one.manifest.inputs), None)
        if asked is None:
            raise ArtifactError(
                "nothing says which prompts these answer: they were brought in, and never labelled",
                str(rollouts.path), "label them first: `rlhf stage label --help`",
            )  # fmt: skip
        credit = None if labels is None else next((one for one in beside if _made_of(one, "advantages", labels)), None)
        return cls(rollouts, _parent(asked, "prompts"), labels, credit)

    @property
    def step(self) -> int:
        """The iteration; 0 outside the loop."""
        return place_of(self.rollouts.path)[1] or 0

    def chat(self) -> Chat:
        """The tokenizer that the prompts were rendered with."""
        name = "policy" if "policy" in self.rollouts.manifest.inputs else "tokenizer"
        chat = Chat(_place(self.rollouts, name))
        said = (next(self.rollouts.parts(["sample"])).schema.metadata or {}).get(b"tokenizer_digest")
        if said is not None and said.decode() != chat.metadata()["tokenizer_digest"]:
            raise ArtifactError("another tokenizer than the rollouts were written with", str(chat.checkpoint))
        return chat

    def rows(self, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
        """The responses in their order: columns of rollouts, messages and answer, and reward and advantage if known."""
        asked = _frame(self.prompts, ["prompt_id", "messages", "answer"]).rename({"prompt_id": "asked"})
        rewards = None if self.labels is None else _frame(self.labels, [*KEY, "reward"])
        credit = None if self.advantages is None else _frame(self.advantages, [*KEY, "advantages"])
        for part in self.rollouts.parts():
            frame = pl.DataFrame(pl.from_arrow(part)).with_columns(
                asked=pl.col("prompt_id").str.split("#").list.first()
            )
            frame = frame.join(asked, on="asked", how="left", maintain_order="left")
            if lost := frame["messages"].null_count():
                raise ContractError(f"{lost} rows answer no prompt of {self.prompts.path}", str(self.rollouts.path))
            if rewards is not None:
                frame = frame.join(rewards, on=KEY, how="left", maintain_order="left")
                left_out["rewards of rows without a label"] += frame["reward"].null_count()
            if credit is not None:
                frame = frame.join(credit, on=KEY, how="left", maintain_order="left").with_columns(_single_advantage())
                left_out["advantages of rows that do not train"] += frame["advantages"].null_count()
                differ = frame["advantage"].null_count() - frame["advantages"].null_count()
                left_out["advantages that differ from token to token"] += differ
            yield from frame.iter_rows(named=True)


def _single_advantage() -> pl.Expr:
    by_token = pl.col("advantages")
    return pl.when(by_token.list.min() == by_token.list.max()).then(by_token.list.first()).alias("advantage")


def _frame(artifact: Artifact, columns: list[str]) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(artifact.table(columns)))


def _made_of(one: Artifact, kind: str, parent: Artifact) -> bool:
    records = one.manifest.inputs.get(parent.manifest.kind, [])
    return one.manifest.kind == kind and any(record.digest == parent.manifest.digest for record in records)


def _parent(artifact: Artifact, name: str) -> Artifact:
    found = Artifact.open(_place(artifact, name))
    if found.manifest.digest != artifact.manifest.inputs[name][0].digest:
        raise ArtifactError(
            f"the {name} are not those that {artifact.path} was made of", str(found.path), "`rlhf lineage` shows more"
        )
    return found


def _place(artifact: Artifact, name: str) -> Path:
    record = artifact.manifest.inputs[name][0]
    place = lies_at(record, artifact.path.resolve().parents)
    if place is None:
        raise ArtifactError(f"its {name} are gone", record.path, f"bring back what {artifact.path} was made of")
    return place
