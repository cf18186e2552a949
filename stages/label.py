"""rollouts, prompts (, scores) -> labels: reward every response; decide which rows train, and say why not."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline import grading, ragged
from pipeline.algorithms.filters import FILTERS
from pipeline.algorithms.labels import LABELS as LABELERS
from pipeline.algorithms.shelf import Line, Piece
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import LABELS, PROMPTS, ROLLOUTS, SCORES
from pipeline.errors import ContractError
from pipeline.experiment import Experiment
from pipeline.grading import Judgement
from pipeline.stage import StageSettings, stage

Columns = dict[str, Any]


class Settings(StageSettings):
    """How to reward, and what to keep."""

    label: Line
    """A recipe line of the label shelf, e.g. {kind = "verifier", wrong = -1.0}."""
    filter: tuple[Line, ...] = ()
    """Recipe lines of the filter shelf; a row trains if all of them keep it."""
    room: int | None = Field(None, ge=0)
    """Groups still wanted this iteration; all when absent. Groups beyond it stay, marked `surplus group`."""
    grader_seconds: float = Field(5.0, gt=0)
    """One answer's grading is killed after this time; the row is then dropped, not punished."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`recipe.label` and `recipe.filter`."""
        recipe = experiment.recipe
        return {"label": recipe.label, "filter": recipe.filter, "grader_seconds": experiment.resources.grader_seconds}


@dataclass(frozen=True)
class Inputs:
    """What was answered, what had been asked, and what models said of it where the recipe wants that."""

    rollouts: Annotated[Artifact, ROLLOUTS]
    prompts: Annotated[Artifact, PROMPTS]
    judgements: Annotated[Artifact | None, SCORES] = None


def asked(prompt_ids: Sequence[str], prompts: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The prompt of each row; `#1` of a second draw aside. Raises `ContractError` for a row that asks nothing."""
    plain = [prompt_id.partition("#")[0] for prompt_id in prompt_ids]
    unknown = sorted({prompt_id for prompt_id in plain if prompt_id not in prompts})
    if unknown:
        raise ContractError(
            f"{len(unknown)} prompts of the rollouts are not among the prompts: {', '.join(unknown[:5])}",
            do="label with the prompts that were sampled from",
        )
    return [prompts[prompt_id] for prompt_id in plain]


def graded(responses: Sequence[str], rows: Sequence[Mapping[str, Any]], seconds: float) -> list[Judgement]:
    """One judgement per response, each by the grader that its prompt names."""
    judgements: list[Judgement | None] = [None] * len(responses)
    for name in sorted({row["grader"] for row in rows}):
        places = [place for place, row in enumerate(rows) if row["grader"] == name]
        verdicts = grading.judge(
            name, [responses[p] for p in places], [rows[p]["answer"] for p in places],
            timeout=seconds, workers=os.cpu_count() or 1,
        )  # fmt: skip
        for place, verdict in zip(places, verdicts, strict=True):
            judgements[place] = verdict
    return [judgement for judgement in judgements if judgement is not None]


def group_numbers(prompt_ids: Sequence[str]) -> np.ndarray:
    """Number of the group of each row, from 0."""
    return np.unique(np.asarray(prompt_ids), return_inverse=True)[1]


def dropped(columns: Columns, filters: Sequence[Piece[Any]], statuses: Sequence[str | None]) -> list[str | None]:
    """Why each row does not train; None where it does. A filter sees the rows that those before it kept."""
    reasons = np.array([NO_VERDICT.get(status or "") for status in statuses], dtype=object)
    for piece in filters:
        left = np.flatnonzero(reasons == None)  # noqa: E711  # elementwise
        kept = piece({name: columns[name][left] for name in piece.needs})
        reasons[left[~kept.keep]] = kept.reason
    return list(reasons.tolist())


NO_VERDICT = {"timeout": "grader timeout", "error": "grader error", "bad reference": "bad reference"}
"""A row that could not be judged does not train: its reward would be a guess."""


def without_surplus(reasons: list[str | None], group: np.ndarray, room: int) -> tuple[list[str | None], int]:
    """Mark the kept rows of groups beyond the first `room` kept ones; and how many groups are then kept."""
    kept_groups = list(dict.fromkeys(g for g, reason in zip(group.tolist(), reasons, strict=True) if reason is None))
    surplus = set(kept_groups[room:])
    marked = [
        "surplus group" if reason is None and g in surplus else reason
        for g, reason in zip(group.tolist(), reasons, strict=True)
    ]
    return marked, min(room, len(kept_groups))


def majority_right(group: np.ndarray, judgements: Sequence[Judgement]) -> list[bool]:
    """Per group: is the most frequent answer (the earliest of equals) the right one? Nothing found is no vote."""
    answers: dict[int, Counter[str]] = {}
    right: dict[tuple[int, str], bool] = {}
    for g, judgement in zip(group.tolist(), judgements, strict=True):
        votes = answers.setdefault(g, Counter())
        if judgement.extracted is not None:
            votes[judgement.extracted] += 1
            right[g, judgement.extracted] = bool(judgement.correct)
    return [bool(votes) and right[g, votes.most_common(1)[0][0]] for g, votes in answers.items()]


def columns_of(part: pa.Table, judgements: Sequence[Judgement]) -> Columns:
    """The columns that label and filter pieces may ask for."""
    counts = ragged.lengths(part["response_tokens"])
    right = {True: 1.0, False: 0.0, None: np.nan}
    columns: Columns = {
        "responses": part["response"].to_pylist(),
        "group": group_numbers(part["prompt_id"].to_pylist()),
        "sample": part["sample"].to_numpy(),
        "finished": np.asarray([finish == "stop" for finish in part["finish"].to_pylist()]),
        "mask": ragged.mask_of(counts),
    }
    if judgements:
        columns["verdicts"] = np.asarray([right[judgement.correct] for judgement in judgements])
    if part["sampler_logprobs"].null_count == 0:
        columns["sampler_logprobs"] = ragged.pad(part["sampler_logprobs"])
    return columns


def labelled(part: pa.Table, columns: Columns, rewards: np.ndarray, reasons: Sequence[str | None],
             judgements: Sequence[Judgement], rows: Sequence[Mapping[str, Any]]) -> pa.Table:  # fmt: skip
    """Rows of the labels contract."""
    nothing = [None] * part.num_rows
    made = {
        "prompt_id": part["prompt_id"].to_pylist(),
        "sample": part["sample"].to_pylist(),
        "reward": rewards,
        "correct": [j.correct for j in judgements] or nothing,
        "extracted": [j.extracted for j in judgements] or nothing,
        "target": [row["answer"] for row in rows] if judgements else nothing,
        "verdict": [j.status for j in judgements] or nothing,
        "vote_share": nothing,
        "keep": [reason is None for reason in reasons],
        "dropped": list(reasons),
    }
    return pa.table(made, schema=LABELS.schema())


@dataclass
class Tally:
    """What the parts add up to."""

    rewards: list[np.ndarray]
    spreads: list[float]
    """Per group: largest minus smallest reward."""
    accuracies: list[float]
    """Per group: share of right responses among those with a verdict."""
    solved: list[bool]
    """Per group: any right response."""
    majorities: list[bool]
    verdicts: Counter[str]
    dropped: Counter[str]
    groups_kept: int = 0

    def add(self, columns: Columns, rewards: np.ndarray, judgements: Sequence[Judgement]) -> None:
        """Count one part."""
        self.rewards.append(rewards)
        self.verdicts.update(judgement.status for judgement in judgements)
        for group in range(int(columns["group"].max()) + 1):
            rows = columns["group"] == group
            self.spreads.append(float(np.ptp(rewards[rows])))
            if "verdicts" in columns and np.isfinite(columns["verdicts"][rows]).any():
                self.accuracies.append(float(np.nanmean(columns["verdicts"][rows])))
                self.solved.append(bool((columns["verdicts"][rows] == 1.0).any()))
        if judgements:
            self.majorities += majority_right(columns["group"], judgements)

    def report(self, out: Outbox) -> None:
        """Leave the numbers in metrics and stats."""
        rewards = np.concatenate(self.rewards)
        numbers = {
            "reward/mean": (float(rewards.mean()), "reward"),
            "reward/std": (float(rewards.std()), "reward"),
            "reward/zero_spread_groups": (float(np.mean(np.asarray(self.spreads) == 0)), "fraction"),
            "groups/kept": (float(self.groups_kept), "groups"),
            "groups/seen": (float(len(self.spreads)), "groups"),
        }
        if self.accuracies:
            numbers |= {
                "accuracy/mean": (float(np.mean(self.accuracies)), "fraction"),
                "accuracy/pass_at_k": (float(np.mean(self.solved)), "fraction"),
                "accuracy/majority_at_k": (float(np.mean(self.majorities)), "fraction"),
            }
        numbers |= {f"verdict/{name.replace(' ', '_')}": (float(n), "rows") for name, n in self.verdicts.items()}
        numbers |= {f"dropped/{name.replace(' ', '_')}": (float(n), "rows") for name, n in self.dropped.items()}
        for name, (value, unit) in numbers.items():
            out.metrics.add(name, value, unit)
        out.stats |= {name: value for name, (value, _) in numbers.items()}


def refuse_unanswered(rows: Sequence[Mapping[str, Any]], prompts: Artifact) -> None:
    """Raise `ContractError` where a verdict is wanted and there is no answer or no grader to give it."""
    bad = sorted({row["prompt_id"] for row in rows if row["answer"] is None or row["grader"] == "none"})
    if bad:
        raise ContractError(
            f"the recipe rewards right answers, but {len(bad)} prompts have no answer or grader: {', '.join(bad[:5])}",
            f"{prompts.path} column answer",
            "ingest prompts with answers and a grader, or choose a recipe without `verifier`",
        )


def scores_of(part: pa.Table, judgements: Artifact) -> np.ndarray:
    """The reward model's score of each row. Raises `ContractError` for rows it has not read."""
    table = judgements.table(["prompt_id", "sample", "reward_scores"])
    known = {(row["prompt_id"], row["sample"]): row["reward_scores"] for row in table.to_pylist()}
    keys = list(zip(part["prompt_id"].to_pylist(), part["sample"].to_pylist(), strict=True))
    missing = [key for key in keys if key not in known]
    if missing:
        raise ContractError(f"{len(missing)} rows have no score; first: {missing[:5]}", str(judgements.path))
    return np.asarray([known[key] for key in keys], dtype=np.float32)


@stage(writes=LABELS, version=1)
def label(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Reward every response; decide which rows train, and say why not."""
    labeler = LABELERS.take(settings.label)
    filters = [FILTERS.take(line) for line in settings.filter]
    prompts = {row["prompt_id"]: row for row in inputs.prompts.table().to_pylist()}
    needs = {name for piece in (labeler, *filters) for name in piece.needs}
    tally = Tally([], [], [], [], [], Counter(), Counter())
    for index, part in enumerate(inputs.rollouts.parts()):
        rows = asked(part["prompt_id"].to_pylist(), prompts)
        if "verdicts" in needs:
            refuse_unanswered(rows, inputs.prompts)
        judgements = graded(part["response"].to_pylist(), rows, settings.grader_seconds) if "verdicts" in needs else []
        columns = columns_of(part, judgements)
        if inputs.judgements is not None:
            columns["reward_scores"] = scores_of(part, inputs.judgements)
        labels = labeler(columns)
        columns["rewards"] = labels.rewards
        reasons = dropped(columns, filters, [j.status for j in judgements] or [None] * part.num_rows)
        room = part.num_rows if settings.room is None else settings.room - tally.groups_kept
        reasons, kept = without_surplus(reasons, columns["group"], max(room, 0))
        tally.groups_kept += kept
        tally.dropped.update(reason for reason in reasons if reason is not None)
        tally.add(columns, labels.rewards, judgements)
        out.write(index, labelled(part, columns, labels.rewards, reasons, judgements, rows))
    tally.report(out)


if __name__ == "__main__":
    label.main()
