"""rollouts, prompts -> questions: what people are asked to put in order, with a page and sheets for their answers."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Self

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from pipeline.annotating.page import PAGE_FILE, write_page
from pipeline.annotating.sheets import CSV_FILE, FORMULA, JSONL_FILE, assigned, write_csv, write_jsonl
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import PROMPTS, QUESTIONS, ROLLOUTS
from pipeline.errors import ContractError
from pipeline.experiment import Experiment
from pipeline.seeds import derive
from pipeline.stage import StageSettings, stage

ID_DIGITS = 16


class Settings(StageSettings):
    """How much is asked, and of whom."""

    responses: int = Field(9, ge=2, le=99)
    """Most responses per question; InstructGPT shows 4 to 9 (arXiv:2203.02155, section 3.5). More are left out."""
    annotators: tuple[str, ...] = ()
    """Names of those who are asked; anybody when absent."""
    overlap: int = Field(1, ge=1)
    """Annotators per question."""
    seed: int = 0
    """Of the run: who is asked what, and in which order responses stand, follows from it."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`feedback.responses`, `.annotators` and `.overlap`, and `seed`."""
        plan = experiment.feedback
        return {
            "responses": plan.responses, "annotators": plan.annotators, "overlap": plan.overlap,
            "seed": experiment.seed,
        }  # fmt: skip

    @field_validator("annotators")
    @classmethod
    def _can_be_written(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names come back in files that people typed in: they have to survive a cell of a spreadsheet."""
        for name in names:
            if not name or not name.isprintable() or name != name.strip():
                raise ValueError(f"{name!r} is no name: write visible characters on one line, no space around them")
            if name.startswith(FORMULA):
                raise ValueError(f"{name!r}: a spreadsheet would take this name for a formula; begin with a letter")
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise ValueError(f"{', '.join(twice)} more than once: names tell annotators apart")
        return names

    @model_validator(mode="after")
    def _enough_of_them(self) -> Self:
        if self.annotators and self.overlap > len(self.annotators):
            raise ValueError(
                f"overlap: {self.overlap} annotators per question, and {len(self.annotators)} are named: "
                f"{', '.join(self.annotators)}"
            )
        return self


@dataclass(frozen=True)
class Inputs:
    """What was answered, and what had been asked."""

    rollouts: Annotated[Artifact, ROLLOUTS]
    prompts: Annotated[Artifact, PROMPTS]


@dataclass
class Tally:
    """What is in no question."""

    left_out: Counter[str] = field(default_factory=Counter)
    """Why -> responses (`cut`, `duplicate`, `surplus`) or prompts (`too_few`)."""

    def __str__(self) -> str:
        found = (f"{name.replace('_', ' ')} {self.left_out[name]} {unit}" for name, unit in LEFT_OUT.items())
        return ", ".join(found)


LEFT_OUT = {"cut": "responses", "duplicate": "responses", "surplus": "responses", "too_few": "prompts"}
"""Why something is in no question, and what it is that is not."""

Candidates = dict[str, str]
"""Text of a response -> its `response_id`, in the order of the rollouts."""


def candidates(rollouts: pa.Table, limit: int, tally: Tally) -> dict[str, Candidates]:
    """The first `limit` different finished responses to each prompt, all its draws together.

    A ranking holds texts, and a text that is read back is taken for finished; so what was cut is in none.
    """
    found: dict[str, Candidates] = {}
    for row in rollouts.to_pylist():
        responses = found.setdefault(row["prompt_id"].partition("#")[0], {})
        if row["finish"] == "length":
            tally.left_out["cut"] += 1
        elif row["response"] in responses:
            tally.left_out["duplicate"] += 1
        else:
            responses[row["response"]] = f"{row['prompt_id']}/{row['sample']}"
    tally.left_out["surplus"] = sum(max(0, len(responses) - limit) for responses in found.values())
    return {prompt_id: dict(islice(responses.items(), limit)) for prompt_id, responses in found.items()}


def asked(prompt_ids: Sequence[str], prompts: Artifact) -> list[dict[str, Any]]:
    """The prompts of these ids. Raises `ContractError` for one that is not there."""
    known = {row["prompt_id"]: row for row in prompts.table().to_pylist()}
    if unknown := [prompt_id for prompt_id in prompt_ids if prompt_id not in known]:
        raise ContractError(
            f"{len(unknown)} prompts of the rollouts are not among the prompts: {', '.join(unknown[:5])}",
            str(prompts.path),
            "ask with the prompts that were sampled from",
        )
    return [known[prompt_id] for prompt_id in prompt_ids]


def question_id_of(prompt_id: str, texts: Iterable[str]) -> str:
    """The same for the same prompt and responses, whatever their order; no spreadsheet takes it for a number."""
    named = json.dumps([prompt_id, sorted(texts)])
    return f"q{hashlib.sha256(named.encode()).hexdigest()[:ID_DIGITS]}"


def question(prompt: Mapping[str, Any], responses: Candidates, seed: int) -> dict[str, Any]:
    """A row of the questions contract, without annotators. The place of a response tells nothing of its sample."""
    question_id = question_id_of(prompt["prompt_id"], responses)
    shuffled = sorted(responses, key=lambda text: (derive(seed, "ask", "place", question_id, text), text))
    return {
        "question_id": question_id, "prompt_id": prompt["prompt_id"], "messages": prompt["messages"],
        "responses": shuffled, "response_ids": [responses[text] for text in shuffled], "source": prompt["source"],
    }  # fmt: skip


def questions(rollouts: pa.Table, prompts: Artifact, settings: Settings, tally: Tally) -> list[dict[str, Any]]:
    """The question on each prompt that has two different finished responses, in the order of the rollouts."""
    groups = candidates(rollouts, settings.responses, tally)
    rows = asked(list(groups), prompts)
    made = [
        question(row, groups[row["prompt_id"]], settings.seed) for row in rows if len(groups[row["prompt_id"]]) >= 2
    ]
    tally.left_out["too_few"] = len(rows) - len(made)
    named: dict[str, list[str]] = {}
    if settings.annotators:
        ids = [row["question_id"] for row in made]
        named = assigned(ids, settings.annotators, settings.overlap, settings.seed)
    return [{**row, "annotators": named.get(row["question_id"], [])} for row in made]


def report(made: Sequence[Mapping[str, Any]], settings: Settings, tally: Tally, out: Outbox) -> None:
    """Leave the numbers in metrics and stats, and say who is asked how much."""
    for name, unit in LEFT_OUT.items():
        out.metrics.add(f"rejected/{name}", tally.left_out[name], unit)
    rejected = tally.left_out["too_few"]
    mean = sum(len(row["responses"]) for row in made) / len(made)
    out.stats |= {"rejected": rejected, "asked": len(made) * settings.overlap}
    out.metrics.add("rows/rejected", rejected, "prompts")
    out.metrics.add("questions/responses", mean, "responses")
    out.metrics.add("questions/asked", len(made) * settings.overlap, "rankings")
    loads = Counter(name for row in made for name in row["annotators"])
    if settings.annotators:
        out.metrics.add("questions/per_annotator", loads.total() / len(settings.annotators), "questions")
    whom = ", ".join(f"{name} {loads[name]}" for name in settings.annotators) or f"anybody, {settings.overlap} each"
    out.say(f"{len(made)} questions of {mean:.1f} responses for {whom}")
    if rejected or tally.left_out["surplus"]:
        out.say(f"{rejected} prompts make no question: {tally}")


@stage(writes=QUESTIONS, version=1)
def ask(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Make questions of the responses to each prompt, and the page and sheets to answer them in."""
    tally = Tally()
    rollouts = inputs.rollouts.table(["prompt_id", "sample", "response", "finish"])
    made = questions(rollouts, inputs.prompts, settings, tally)
    if not made:
        raise ContractError(
            f"no prompt has two different responses that are finished: {tally}", str(inputs.rollouts.path),
            "sample more responses per prompt (feedback.responses), or longer ones (scale.response_tokens)",
        )  # fmt: skip
    out.write(0, pa.Table.from_pylist(made, schema=QUESTIONS.schema()))
    write_csv(out.path / CSV_FILE, made)
    write_jsonl(out.path / JSONL_FILE, made)
    write_page(out.path / PAGE_FILE, made, settings.overlap)
    report(made, settings, tally, out)


if __name__ == "__main__":
    ask.main()
