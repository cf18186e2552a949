"""rollouts, prompts -> rankings: order the responses to each prompt, as a simulated annotator would."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import PROMPTS, RANKINGS, ROLLOUTS
from pipeline.errors import ContractError
from pipeline.experiment import Experiment
from pipeline.grading import mixed
from pipeline.seeds import derive
from pipeline.stage import StageSettings, stage

ANNOTATOR = "grader"
RIGHT, WRONG = 0, 1


class Settings(StageSettings):
    """How the simulated annotator judges."""

    error_rate: float = Field(0.0, ge=0, lt=1)
    """Probability with which each of its verdicts is turned round."""
    seed: int = 0
    """Of the run: which verdicts are turned round follows from it."""
    grader_seconds: float = Field(5.0, gt=0)
    """One answer's grading is killed after this time; the response is then in no ranking."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`feedback.error_rate`."""
        return {
            "error_rate": experiment.feedback.error_rate, "seed": experiment.seed,
            "grader_seconds": experiment.resources.grader_seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What was answered, and what had been asked."""

    rollouts: Annotated[Artifact, ROLLOUTS]
    prompts: Annotated[Artifact, PROMPTS]


@dataclass(frozen=True)
class Candidate:
    """A response to be ranked."""

    key: tuple[str, int]
    """Prompt (with `#1` on a second draw) and sample; of equal responses the first."""
    text: str


@dataclass
class Tally:
    """What was ranked, and what was left out."""

    candidates: list[int] = field(default_factory=list)
    """Responses of each ranking."""
    pairs: int = 0
    """Comparisons in the rankings: pairs of which one is better."""
    verdicts: int = 0
    turned: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Why -> responses (`cut`, `duplicate`, `unjudged`) or prompts (`too_few`, `tie`)."""

    def report(self, out: Outbox) -> None:
        """Leave the numbers in metrics and stats."""
        for name, unit in LEFT_OUT.items():
            out.metrics.add(f"rejected/{name}", self.left_out[name], unit)
        rejected = self.left_out["too_few"] + self.left_out["tie"]
        out.stats |= {"rejected": rejected, "pairs": self.pairs}
        out.metrics.add("rows/rejected", rejected, "prompts")
        out.metrics.add("ranking/pairs", self.pairs, "pairs")
        out.metrics.add("ranking/responses", sum(self.candidates) / len(self.candidates), "responses")
        out.metrics.add("annotator/turned", self.turned / self.verdicts, "fraction")
        if rejected:
            out.say(f"{rejected} prompts make no ranking: {self}")

    def __str__(self) -> str:
        found = (f"{name.replace('_', ' ')} {self.left_out[name]} {unit}" for name, unit in LEFT_OUT.items())
        return ", ".join(found)


LEFT_OUT = {"cut": "responses", "duplicate": "responses", "unjudged": "responses", "too_few": "prompts",
            "tie": "prompts"}  # fmt: skip
"""Why something is in no ranking, and what it is that is not."""


def candidates(rollouts: pa.Table, tally: Tally) -> dict[str, list[Candidate]]:
    """The different finished responses to each prompt, all its draws together.

    A ranking holds texts, and a text that is read back is taken for finished; so what was cut is in none.
    """
    found: dict[str, dict[str, Candidate]] = {}
    for row in rollouts.to_pylist():
        responses = found.setdefault(row["prompt_id"].partition("#")[0], {})
        if row["finish"] == "length":
            tally.left_out["cut"] += 1
        elif row["response"] in responses:
            tally.left_out["duplicate"] += 1
        else:
            responses[row["response"]] = Candidate((row["prompt_id"], row["sample"]), row["response"])
    return {prompt_id: list(responses.values()) for prompt_id, responses in found.items()}


def asked(prompt_ids: Sequence[str], prompts: Artifact) -> list[dict[str, Any]]:
    """The prompts of these ids. Raises `ContractError` for one that is not there, or that nobody could judge."""
    known = {row["prompt_id"]: row for row in prompts.table().to_pylist()}
    if unknown := [prompt_id for prompt_id in prompt_ids if prompt_id not in known]:
        raise ContractError(
            f"{len(unknown)} prompts of the rollouts are not among the prompts: {', '.join(unknown[:5])}",
            str(prompts.path),
            "rank with the prompts that were sampled from",
        )
    rows = [known[prompt_id] for prompt_id in prompt_ids]
    if bad := [row["prompt_id"] for row in rows if row["answer"] is None or row["grader"] == "none"]:
        raise ContractError(
            f"{len(bad)} prompts have no answer or grader to rank their responses by: {', '.join(bad[:5])}",
            f"{prompts.path} column answer",
            "ingest prompts with answers and a grader, or rankings that people made",
        )
    return rows


def mistaken(candidate: Candidate, settings: Settings) -> bool:
    """Whether the annotator turns its verdict on this response round."""
    drawn = derive(settings.seed, "rank", ANNOTATOR, *candidate.key) / 2**63
    return drawn < settings.error_rate


def ranking(prompt: Mapping[str, Any], ranked: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """A row of the rankings contract: what the annotator takes for right is better than what it takes for wrong."""
    responses = [text for text, _ in ranked]
    named = json.dumps([prompt["prompt_id"], responses, ANNOTATOR])
    return {
        "ranking_id": hashlib.sha256(named.encode()).hexdigest()[:16], "prompt_id": prompt["prompt_id"],
        "messages": prompt["messages"], "responses": responses,
        "ranks": [RIGHT if right else WRONG for _, right in ranked], "annotator": ANNOTATOR, "source": prompt["source"],
    }  # fmt: skip


def rankings(rollouts: pa.Table, prompts: Artifact, settings: Settings, tally: Tally) -> Iterator[dict[str, Any]]:
    """The ranking of each prompt whose responses are not all alike to the annotator, in the order of the rollouts."""
    groups = candidates(rollouts, tally)
    rows = asked(list(groups), prompts)
    everyone = [(row, candidate) for row in rows for candidate in groups[row["prompt_id"]]]
    judged = mixed.judge(
        [row["grader"] for row, _ in everyone], [candidate.text for _, candidate in everyone],
        [row["answer"] for row, _ in everyone], timeout=settings.grader_seconds, workers=os.cpu_count() or 1,
    )  # fmt: skip
    by_prompt: dict[str, list[tuple[str, bool]]] = {row["prompt_id"]: [] for row in rows}
    for (row, candidate), (right, _, _) in zip(everyone, judged, strict=True):
        if right is None:
            tally.left_out["unjudged"] += 1
            continue
        turned = mistaken(candidate, settings)
        tally.verdicts += 1
        tally.turned += turned
        by_prompt[row["prompt_id"]].append((candidate.text, right != turned))
    for row in rows:
        ranked = by_prompt[row["prompt_id"]]
        right_ones = sum(right for _, right in ranked)
        if len(ranked) < 2:
            tally.left_out["too_few"] += 1
        elif right_ones in (0, len(ranked)):
            tally.left_out["tie"] += 1
        else:
            tally.candidates.append(len(ranked))
            tally.pairs += right_ones * (len(ranked) - right_ones)
            yield ranking(row, ranked)


@stage(writes=RANKINGS, version=1)
def rank(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Order the responses to each prompt, as a simulated annotator would."""
    tally = Tally()
    rollouts = inputs.rollouts.table(["prompt_id", "sample", "response", "finish"])
    made = list(rankings(rollouts, inputs.prompts, settings, tally))
    if not made:
        raise ContractError(
            f"no prompt has responses of which one is better than another: {tally}", str(inputs.rollouts.path),
            "sample more responses per prompt (feedback.responses), or longer ones (scale.response_tokens)",
        )  # fmt: skip
    out.write(0, pa.Table.from_pylist(made, schema=RANKINGS.schema()))
    tally.report(out)


if __name__ == "__main__":
    rank.main()
