"""questions (, prompts, annotations) -> rankings: responses in order of preference, by people or simulated annotators.

People rank where there are files that they filled in. Simulated annotators know the prompts' answers, and err as often
as they are told to.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field

from pipeline.annotating import agreement, answers
from pipeline.annotating.sheets import Question
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import PROMPTS, QUESTIONS, RANKINGS
from pipeline.errors import ContractError, InputError, WaitingError
from pipeline.experiment import Experiment
from pipeline.grading import mixed
from pipeline.seeds import derive
from pipeline.sources import files
from pipeline.stage import FILES, StageSettings, stage

ANNOTATOR = "grader"
"""Name of the simulated annotator of questions that name none."""
RIGHT, WRONG = 0, 1


class Settings(StageSettings):
    """How simulated annotators judge, and how many of people's rankings must be there."""

    error_rate: float = Field(0.0, ge=0, lt=1)
    """Probability with which each verdict of a simulated annotator is turned round."""
    seed: int = 0
    """Of the run: which verdicts are turned round follows from it."""
    grader_seconds: float = Field(5.0, gt=0)
    """One answer's grading is killed after this time; the response is then in no ranking."""
    answered_share: float = Field(1.0, gt=0, le=1)
    """Least share of the rankings asked of people that must be in their files."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`feedback.error_rate`, `feedback.answered_share`, `resources.grader_seconds` and `seed`."""
        return {
            "error_rate": experiment.feedback.error_rate, "seed": experiment.seed,
            "grader_seconds": experiment.resources.grader_seconds,
            "answered_share": experiment.feedback.answered_share,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What is asked, and who answers: the prompts' answers, or files that people filled in, which come first."""

    questions: Annotated[Artifact, QUESTIONS]
    prompts: Annotated[Artifact | None, PROMPTS] = None
    annotations: Annotated[tuple[Path, ...] | None, FILES] = None


@dataclass(frozen=True)
class Ranking:
    """One annotator's order of responses to one question."""

    question: Question
    annotator: str
    responses: Sequence[str]
    ranks: Sequence[int]
    """0 is the best."""
    seconds: float | None = None
    """That a person spent on it."""

    @property
    def pairs(self) -> int:
        """Pairs of responses of which one is better."""
        count, tied = len(self.ranks), Counter(self.ranks).values()
        return (count * (count - 1) - sum(some * (some - 1) for some in tied)) // 2

    def row(self) -> dict[str, Any]:
        """A row of the rankings contract."""
        named = json.dumps([self.question["question_id"], self.annotator])
        return {
            "ranking_id": hashlib.sha256(named.encode()).hexdigest()[:16], "prompt_id": self.question["prompt_id"],
            "messages": self.question["messages"], "responses": self.responses, "ranks": self.ranks,
            "annotator": self.annotator, "source": self.question["source"],
        }  # fmt: skip


LEFT_OUT = {"unjudged": "responses", "too_few": "rankings", "tie": "rankings", "unanswered": "rankings",
            "blank": "rankings"}  # fmt: skip
"""Why something is in no ranking, and what it is that is not. What was handed back blank is unanswered, too."""


@dataclass
class Tally:
    """What was left out, and what simulated annotators did."""

    left_out: Counter[str] = field(default_factory=Counter)
    verdicts: int = 0
    turned: int = 0

    def __str__(self) -> str:
        found = {name: unit for name, unit in LEFT_OUT.items() if self.left_out[name]}
        return ", ".join(f"{name.replace('_', ' ')} {self.left_out[name]} {unit}" for name, unit in found.items())


def asked(questions: Sequence[Question], prompts: Artifact) -> list[dict[str, Any]]:
    """The prompt of each question. Raises `ContractError` for one that is not there, or that nobody could judge."""
    known = {row["prompt_id"]: row for row in prompts.table().to_pylist()}
    prompt_ids = [question["prompt_id"] for question in questions]
    if unknown := [prompt_id for prompt_id in prompt_ids if prompt_id not in known]:
        raise ContractError(
            f"{len(unknown)} prompts of the questions are not among the prompts: {', '.join(unknown[:5])}",
            str(prompts.path),
            "rank with the prompts that were sampled from",
        )
    rows = [known[prompt_id] for prompt_id in prompt_ids]
    if bad := [row["prompt_id"] for row in rows if row["answer"] is None or row["grader"] == "none"]:
        raise ContractError(
            f"{len(bad)} prompts have no answer or grader to rank their responses by: {', '.join(bad[:5])}",
            f"{prompts.path} column answer",
            "ingest prompts with answers and a grader, or let people rank and give their files: --annotations",
        )
    return rows


def mistaken(annotator: str, response_id: str, settings: Settings) -> bool:
    """Whether a simulated annotator turns its verdict on this response round."""
    return derive(settings.seed, "rank", annotator, response_id) / 2**63 < settings.error_rate


def simulated(questions: Sequence[Question], prompts: Artifact, settings: Settings, tally: Tally) -> list[Ranking]:
    """What annotators say who know the answers: right beats wrong, equals tie, each errs by itself."""
    everything = [
        (prompt, text)
        for question, prompt in zip(questions, asked(questions, prompts), strict=True)
        for text in question["responses"]
    ]
    verdicts = mixed.judge(
        [prompt["grader"] for prompt, _ in everything], [text for _, text in everything],
        [prompt["answer"] for prompt, _ in everything], timeout=settings.grader_seconds, workers=os.cpu_count() or 1,
    )  # fmt: skip
    right = iter(verdict.correct for verdict in verdicts)
    made: list[Ranking] = []
    for question in questions:
        names = question["annotators"] or [ANNOTATOR]
        texts = question["responses"]
        responses = zip(question["response_ids"], texts, islice(right, len(texts)), strict=True)
        judged = [(response_id, text, truth) for response_id, text, truth in responses if truth is not None]
        tally.left_out["unjudged"] += len(texts) - len(judged)
        if len(judged) < 2:
            tally.left_out["too_few"] += len(names)
        else:
            made += [_verdict(question, name, judged, settings, tally) for name in names]
    return made


def _verdict(
    question: Question, annotator: str, judged: Sequence[tuple[str, str, bool]], settings: Settings, tally: Tally
) -> Ranking:
    turned = [mistaken(annotator, response_id, settings) for response_id, _, _ in judged]
    tally.verdicts += len(turned)
    tally.turned += sum(turned)
    ranks = [RIGHT if truth != error else WRONG for (_, _, truth), error in zip(judged, turned, strict=True)]
    return Ranking(question, annotator, [text for _, text, _ in judged], ranks)


def returned(questions: Sequence[Question], inputs: Inputs, settings: Settings, tally: Tally) -> list[Ranking]:
    """What people say in the files that came back.

    Raises `InputError` that lists whatever is wrong with them, and `WaitingError` while too many rankings are missing.
    """
    given = answers.read([(path, files.read([path])) for path in inputs.annotations or ()], questions)
    wanted, missing = answers.asked(questions).total(), answers.unanswered(questions, given.given)
    tally.left_out.update(unanswered=missing.total(), blank=given.blank)
    there = wanted - missing.total()
    if there / wanted < settings.answered_share:
        raise WaitingError(
            f"{missing.total()} of {wanted} rankings asked for are not in the files: {_by_name(missing)}"
            + (f"; handed back blank: {given.blank}" if given.blank else ""),
            f"{inputs.questions.path} (annotate.html, annotate.csv, annotate.jsonl)",
            "let them rank the rest and run this again with all their files, or go on with fewer: lower "
            f"feedback.answered_share, now {settings.answered_share:g}",
        )
    by_id = {question["question_id"]: question for question in questions}
    return [
        Ranking(question, answer.annotator, question["responses"], answer.ranks, answer.seconds)
        for answer in given.given
        for question in [by_id[answer.question_id]]
    ]


def _by_name(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def measured(made: Sequence[Ranking]) -> dict[str, tuple[float, str]]:
    """How far annotators agree, and how long they took: metric -> value and unit."""
    rankings: defaultdict[str, dict[str, Sequence[int]]] = defaultdict(dict)
    for ranking in made:
        rankings[ranking.question["question_id"]][ranking.annotator] = ranking.ranks
    everybody, by_pair = agreement.measure(rankings)
    numbers: dict[str, tuple[float | None, str]] = {"agreement/questions": (everybody.questions, "questions")}
    compared = {"": everybody, **{f"/{'+'.join(names)}": one for names, one in by_pair.items()}}
    for name, one in compared.items():
        numbers[f"agreement/pairwise{name}"] = (one.pairwise, "fraction")
        numbers[f"agreement/untied{name}"] = (one.untied, "fraction")
        numbers[f"agreement/kendall_tau{name}"] = (one.kendall_tau, "")
    seconds = [ranking.seconds for ranking in made if ranking.seconds is not None]
    numbers["annotator/seconds"] = (median(seconds) if seconds else None, "s")
    return {name: (value, unit) for name, (value, unit) in numbers.items() if value is not None}


def report(made: Sequence[Ranking], kept: Sequence[Ranking], tally: Tally, out: Outbox) -> None:
    """Leave the numbers in metrics and stats, and a line or two for people."""
    for name, unit in LEFT_OUT.items():
        out.metrics.add(f"rejected/{name}", tally.left_out[name], unit)
    rejected = tally.left_out["too_few"] + tally.left_out["tie"]
    pairs = sum(ranking.pairs for ranking in kept)
    out.stats |= {"rejected": rejected, "pairs": pairs}
    out.metrics.add("rows/rejected", rejected, "rankings")
    out.metrics.add("ranking/pairs", pairs, "pairs")
    out.metrics.add("ranking/responses", sum(len(ranking.ranks) for ranking in kept) / len(kept), "responses")
    if tally.verdicts:
        out.metrics.add("annotator/turned", tally.turned / tally.verdicts, "fraction")
    by_name = Counter(ranking.annotator for ranking in kept)
    for name, count in sorted(by_name.items()):
        out.metrics.add(f"annotator/{name}/rankings", count, "rankings")
    numbers = measured(made)
    for name, (value, unit) in numbers.items():
        out.metrics.add(name, value, unit)
    lasting = ("agreement/questions", "agreement/pairwise", "agreement/kendall_tau")
    out.stats |= {name: numbers[name][0] for name in lasting if name in numbers}
    out.say(f"{len(kept)} rankings: {_by_name(by_name)}; {_agreed(numbers)}")
    if any(tally.left_out.values()):
        out.say(f"left out: {tally}")


def _agreed(numbers: Mapping[str, tuple[float, str]]) -> str:
    if "agreement/pairwise" not in numbers:
        return "no question was ranked by two annotators"
    tau = f", Kendall's tau {numbers['agreement/kendall_tau'][0]:.2f}" if "agreement/kendall_tau" in numbers else ""
    shared, share = numbers["agreement/questions"][0], numbers["agreement/pairwise"][0]
    return f"of {shared:.0f} questions ranked by several, annotators agree on {share:.1%} of the pairs{tau}"


@stage(writes=RANKINGS, version=2)
def rank(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Put the responses to each question in order, as people did, or as simulated annotators would."""
    questions, tally = inputs.questions.table().to_pylist(), Tally()
    if inputs.annotations:
        made = returned(questions, inputs, settings, tally)
    elif inputs.prompts is not None:
        made = simulated(questions, inputs.prompts, settings, tally)
    else:
        raise InputError(
            "nobody ranks: neither annotations nor prompts are given",
            str(inputs.questions.path),
            "--annotations FILES for what people filled in, or --prompts PATH for annotators who know the answers",
        )
    kept = [ranking for ranking in made if ranking.pairs]
    tally.left_out["tie"] = len(made) - len(kept)
    if not kept:
        raise ContractError(
            f"no question has responses of which one is better than another: {tally}", str(inputs.questions.path),
            "ask about more prompts (feedback.prompts), or about more responses to each (feedback.responses)",
        )  # fmt: skip
    rows = [ranking.row() for ranking in kept]
    out.write(0, pa.Table.from_pylist(rows, schema=RANKINGS.schema(rows[0])))
    report(made, kept, tally, out)


if __name__ == "__main__":
    rank.main()
