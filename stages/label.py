"""rollouts, prompts (, scores) -> labels: reward every response; decide which rows train, and say why not.

Reference answers reach the rewards only where the labeler asks for verdicts. Everywhere else they are looked at for
the column `gold`, the column `verdict` and the metrics: nothing that is trained on depends on them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from pydantic import Field

from pipeline import ragged, seeds
from pipeline.algorithms.filters import FILTERS, Kept
from pipeline.algorithms.labels import LABELS as LABELERS
from pipeline.algorithms.labels import Labels
from pipeline.algorithms.moments import Moments
from pipeline.algorithms.shelf import Line, Piece
from pipeline.artifacts import Artifact, Outbox
from pipeline.contracts import LABELS, PROMPTS, ROLLOUTS, SCORES
from pipeline.errors import ContractError, InputError
from pipeline.experiment import Experiment
from pipeline.grading import LOST, Judgement, Memory
from pipeline.grading.measures import accuracies, election
from pipeline.grading.mixed import Means, Reading, read
from pipeline.journal import NOWHERE, Journal
from pipeline.shards import elsewhere, processors, spread
from pipeline.stage import StageSettings, stage

GREEDY = -1
"""The `sample` of the greedy response: it is rewarded like any other, never trains and counts in no statistic."""

NO_VERDICT = {"timeout": "grader timeout", "error": "grader error", "bad reference": "bad reference"}
"""A row that could not be judged does not train: its reward would be a guess."""

UNITS = {"reward/mean": "reward", "reward/greedy_mean": "reward", "vote/entropy": "nat"}
"""Of the means that are not fractions."""

SCORE_FIRST = 'run `score` with --set needs=["reward_scores"], and give what it makes as --judgements'
"""What to do where a reward model has to judge first."""

SCORED = ("prompt_id", "sample", "reward_scores")
"""Columns of a reward model's judgements."""

Columns = dict[str, Any]
Prompt = Mapping[str, Any]


class Settings(StageSettings):
    """How to reward, and what to keep."""

    label: Line
    """A recipe line of the label shelf, e.g. {kind = "verifier", wrong = -1.0}."""
    filter: tuple[Line, ...] = ()
    """Recipe lines of the filter shelf; a row trains if all of them keep it."""
    room: int | None = Field(None, ge=0)
    """Groups still wanted this iteration; all when absent. Groups beyond it stay, marked `surplus group`."""
    grader: str | None = None
    """Takes the place of the grader that each prompt names; theirs when absent."""
    grader_seconds: float = Field(5.0, gt=0)
    """One answer's grading is killed after this time; the row is then dropped, not punished."""
    seed: int = 0
    """Of the lottery, for filters that draw."""

    @classmethod
    def slice(cls, experiment: Experiment, changes: Mapping[str, Any]) -> dict[str, Any]:
        """`recipe.label`, `recipe.filter` and `seed`."""
        recipe = experiment.recipe
        return {
            "label": recipe.label, "filter": recipe.filter, "grader_seconds": experiment.resources.grader_seconds,
            "seed": experiment.seed,
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What was answered, what had been asked, and what models said of it where the recipe wants that."""

    rollouts: Annotated[Artifact, ROLLOUTS]
    prompts: Annotated[Artifact, PROMPTS]
    judgements: Annotated[Artifact | None, SCORES] = None


def asked(prompt_ids: Sequence[str], prompts: pa.Table) -> list[Prompt]:
    """The prompt of each row; `#1` of a second draw aside. Raises `ContractError` for a row that asks nothing."""
    plain = [prompt_id.partition("#")[0] for prompt_id in prompt_ids]
    there = prompts.filter(pc.is_in(prompts["prompt_id"], value_set=pa.array(sorted(set(plain)), pa.string())))
    found = {row["prompt_id"]: row for row in there.to_pylist()}
    unknown = sorted({prompt_id for prompt_id in plain if prompt_id not in found})
    if unknown:
        raise ContractError(
            f"{len(unknown)} prompts of the rollouts are not among the prompts: {', '.join(unknown[:5])}",
            do="label with the prompts that were sampled from",
        )
    return [found[prompt_id] for prompt_id in plain]


def answered(row: Prompt) -> bool:
    """Whether a response to this prompt can be right or wrong."""
    return row["answer"] is not None and row["grader"] != "none"


def columns_of(part: pa.Table) -> Columns:
    """The columns that every part has for label and filter pieces."""
    columns: Columns = {
        "responses": part["response"].to_pylist(),
        "group": np.unique(np.asarray(part["prompt_id"].to_pylist()), return_inverse=True)[1],
        "sample": part["sample"].to_numpy(),
        "finished": np.asarray([finish == "stop" for finish in part["finish"].to_pylist()]),
        "mask": ragged.mask_of(ragged.lengths(part["response_tokens"])),
    }
    if part["sampler_logprobs"].null_count == 0:
        columns["sampler_logprobs"] = ragged.pad(part["sampler_logprobs"])
    return columns


def lottery(part: pa.Table, seed: int) -> Float[np.ndarray, " B"]:
    """A number in [0, 1) for each row, that depends on nothing but seed and key."""
    keys = zip(part["prompt_id"].to_pylist(), part["sample"].to_pylist(), strict=True)
    return np.asarray([(seeds.derive(seed, "lottery", *key) >> 10) / 2**53 for key in keys])


@dataclass(frozen=True)
class Judged:
    """A part with its rewards."""

    keys: pa.Table
    """`prompt_id`, `sample`."""
    columns: Columns
    reading: Reading
    labels: Labels
    targets: Sequence[str | None]
    """What the labeler compared each response with."""
    reasons: list[str | None]
    """Why each row does not train; None where it does."""
    retried: int = 0
    """Rows that a grader was asked about once more."""
    recovered: int = 0
    """Those of them that it then got through."""


def judged(
    part: pa.Table, rows: Sequence[Prompt], labeler: Piece[Labels], filters: Sequence[Piece[Kept]],
    settings: Settings, means: Means, scores: Float[np.ndarray, " B"] | None = None,
) -> Judged:  # fmt: skip
    """Reward the responses of a part and let the filters look. Raises `ContractError` for a column that is not there.

    Filters see what the labeler takes for right, and the rows that the filters before them kept.
    """
    columns = columns_of(part)
    if "sampler_logprobs" in labeler.needs and "sampler_logprobs" not in columns:
        raise ContractError(
            f"label {labeler.name!r} needs sampler_logprobs, and these rollouts were adopted without them",
            "rollouts, column sampler_logprobs",
            "sample with `rollout`, or choose a recipe with another labeler",
        )
    reading = read(
        [row["grader"] for row in rows], columns["responses"],
        [row["answer"] if answered(row) else None for row in rows], columns["group"].tolist(),
        needs=labeler.needs, last=columns["sample"] == GREEDY, means=means,
    )  # fmt: skip
    if "verdicts" in labeler.needs:
        columns["verdicts"] = _numbers([judgement.correct if judgement else None for judgement in reading.gold])
    if reading.classes is not None:
        columns["answers"] = reading.classes
    if scores is not None:
        columns["reward_scores"] = scores
    labels = labeler(columns)
    target: Sequence[str | None] = [row["answer"] if "verdicts" in labeler.needs else None for row in rows]
    if labels.target is not None:
        target = winners(columns, labels.target, reading.extracted)
    columns |= {"rewards": labels.rewards, "verdicts": labels.verdicts}
    if any("lottery" in piece.needs for piece in filters):
        columns["lottery"] = lottery(part, settings.seed)
    reasons = dropped(columns, filters, reading.statuses)
    return Judged(part.select(["prompt_id", "sample"]), columns, reading, labels, target, reasons)


def _numbers(right: Sequence[bool | None]) -> Float[np.ndarray, " B"]:
    return np.asarray([np.nan if one is None else float(one) for one in right])


def winners(columns: Columns, target: np.ndarray, extracted: Sequence[str | None]) -> list[str | None]:
    """The first answer, among the sampled responses, of the class that each row was compared with."""
    first: dict[tuple[int, int], str | None] = {}
    for row in np.argsort(columns["sample"] == GREEDY, kind="stable"):
        first.setdefault((columns["group"][row], columns["answers"][row]), extracted[row])
    return [
        None if number < 0 else first.get((group, number))
        for group, number in zip(columns["group"], target, strict=True)
    ]


def dropped(columns: Columns, filters: Sequence[Piece[Kept]], statuses: Sequence[str | None]) -> list[str | None]:
    """Why each row does not train; None where it does. A filter sees the rows that those before it kept."""
    reasons = np.array([NO_VERDICT.get(status or "") for status in statuses], dtype=object)
    greedy = columns["sample"] == GREEDY
    adrift = np.isin(columns["group"], columns["group"][greedy & (reasons != None)])  # noqa: E711  # elementwise
    reasons[adrift & (reasons == None)] = "no greedy reward"  # noqa: E711  # elementwise
    reasons[greedy] = "greedy baseline"
    for piece in filters:
        left = np.flatnonzero(reasons == None)  # noqa: E711  # elementwise
        kept = piece({name: columns[name][left] for name in piece.needs})
        reasons[left[~kept.keep]] = kept.reason
    return list(reasons.tolist())


def without_surplus(reasons: list[str | None], group: np.ndarray, room: int) -> tuple[list[str | None], int]:
    """Mark the kept rows of groups beyond the first `room` kept ones; and how many groups are then kept."""
    kept_groups = list(dict.fromkeys(g for g, reason in zip(group.tolist(), reasons, strict=True) if reason is None))
    surplus = set(kept_groups[room:])
    marked = [
        "surplus group" if reason is None and g in surplus else reason
        for g, reason in zip(group.tolist(), reasons, strict=True)
    ]
    return marked, min(room, len(kept_groups))


def labelled(made: Judged, reasons: Sequence[str | None]) -> pa.Table:
    """Rows of the labels contract."""
    nothing = [None] * made.keys.num_rows
    right = {1.0: True, 0.0: False}
    share = made.labels.vote_share
    columns = {
        "prompt_id": made.keys["prompt_id"],
        "sample": made.keys["sample"],
        "reward": made.labels.rewards,
        "correct": [right.get(verdict) for verdict in made.labels.verdicts.tolist()],
        "gold": [judgement and judgement.correct for judgement in made.reading.gold],
        "extracted": made.reading.extracted,
        "target": made.targets,
        "verdict": [judgement and judgement.status for judgement in made.reading.gold],
        "vote_share": nothing if share is None else share.astype(np.float32),
        "keep": [reason is None for reason in reasons],
        "dropped": list(reasons),
    }
    return pa.table(columns, schema=LABELS.schema())


def _by_group(group: Int[np.ndarray, " B"]) -> list[Int[np.ndarray, " G"]]:
    """The rows of each group, in their order."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else []


@dataclass
class Tally:
    """What the parts add up to."""

    shares: dict[str, Moments] = field(default_factory=dict)
    """Metrics that are means: of the values of rows or of groups."""
    counts: Counter[str] = field(default_factory=Counter)
    """Metrics that are sums, in rows."""
    lost: int | None = None
    """Comparisons of two answers that hung or failed; None where nothing votes."""
    groups_seen: int = 0
    groups_kept: int = 0

    def add(self, made: Judged, reasons: Sequence[str | None]) -> None:
        """Count one part."""
        columns, labels, gold = made.columns, made.labels, made.reading.gold
        greedy = columns["sample"] == GREEDY
        shares: dict[str, list[float]] = {
            "reward/greedy_mean": labels.rewards[greedy].tolist(), "reward/mean": labels.rewards[~greedy].tolist()
        }  # fmt: skip
        if labels.added_nothing is not None:
            shares["reward/underflow"] = labels.added_nothing[~greedy].tolist()
        sampled = np.flatnonzero(~greedy)
        for rows in _by_group(columns["group"][sampled]):
            for name, value in self._of_group(made, sampled[rows]).items():
                shares.setdefault(name, []).append(value)
        right = [self._row(gold[row], float(labels.verdicts[row])) for row in sampled.tolist()]
        if labels.target is not None:
            shares["vote/reward_accuracy"] = [value for value in right if value is not None]
        seen = [
            {status, verdict and verdict.status} - {None}
            for verdict, status in zip(gold, made.reading.statuses, strict=True)
        ]
        shares["grader/failures"] = [float(bool(statuses & LOST.keys())) for statuses in seen if statuses]
        for name, values in shares.items():
            self.shares[name] = self.shares.get(name, Moments()) + Moments.of(np.asarray(values, np.float64))
        self.counts.update(f"dropped/{reason.replace(' ', '_')}" for reason in reasons if reason is not None)
        self.counts.update({"grader/retried": made.retried, "grader/recovered": made.recovered})
        if made.reading.classes is not None:
            self.lost = (self.lost or 0) + made.reading.lost

    def _of_group(self, made: Judged, rows: Int[np.ndarray, " G"]) -> dict[str, float]:
        self.groups_seen += 1
        gold = [made.reading.gold[row] for row in rows.tolist()]
        numbers = {"reward/zero_spread_groups": float(np.ptp(made.labels.rewards[rows]) == 0), **accuracies(gold)}
        if made.labels.target is not None:
            numbers |= election(made.columns["answers"][rows], int(made.labels.target[rows[0]]), gold)
        return numbers

    def _row(self, gold: Judgement | None, verdict: float) -> float | None:
        """Count a verdict; whether the labeler agrees with it, None where one of the two does not say."""
        if gold is None:
            return None
        self.counts[f"verdict/{gold.status.replace(' ', '_')}"] += 1
        return None if gold.correct is None or np.isnan(verdict) else float(gold.correct == verdict)

    def report(self, out: Outbox) -> None:
        """Leave the numbers in metrics and stats."""
        numbers = {
            name: (values.mean, UNITS.get(name, "fraction"))
            for name, values in self.shares.items()
            if values.count or name == "grader/failures"
        }
        numbers["reward/std"] = (self.shares["reward/mean"].std, "reward")
        numbers |= {
            "groups/kept": (float(self.groups_kept), "groups"),
            "groups/seen": (float(self.groups_seen), "groups"),
        }
        numbers |= {name: (float(count), "rows") for name, count in self.counts.items()}
        if self.lost is not None:
            numbers["vote/lost_comparisons"] = (float(self.lost), "comparisons")
        for name, (value, unit) in numbers.items():
            out.metrics.add(name, value, unit)
        out.stats |= {name: value for name, (value, _) in numbers.items()}


def refuse_unanswered(rows: Sequence[Prompt], prompts: Artifact) -> None:
    """Raise `ContractError` where a verdict is wanted and there is no answer or no grader to give it."""
    bad = sorted({row["prompt_id"] for row in rows if not answered(row)})
    if bad:
        raise ContractError(
            f"the recipe rewards right answers, but {len(bad)} prompts have no answer or grader: {', '.join(bad[:5])}",
            f"{prompts.path} column answer",
            "ingest prompts with answers and a grader, or choose a recipe without `verifier`",
        )


def refuse_ungraded(rows: Sequence[Prompt], prompts: Artifact) -> None:
    """Raise `ContractError` where answers are to be compared with each other and there is no grader to do it."""
    bad = sorted({row["prompt_id"] for row in rows if row["grader"] == "none"})
    if bad:
        raise ContractError(
            f"the recipe compares answers with each other, but {len(bad)} prompts have no grader: {', '.join(bad[:5])}",
            f"{prompts.path} column grader",
            "ingest the prompts with a grader (an answer they need not have), or choose a recipe that does not vote",
        )


def scores_of(part: pa.Table, judged: pa.Table) -> Float[np.ndarray, " B"]:
    """The reward model's score of each row. Raises `ContractError` for rows it has not read."""
    near = judged.filter(pc.is_in(judged["prompt_id"], value_set=pc.unique(part["prompt_id"])))
    columns = (near[name].to_pylist() for name in SCORED)
    known = {(prompt_id, sample): score for prompt_id, sample, score in zip(*columns, strict=True)}
    keys = list(zip(part["prompt_id"].to_pylist(), part["sample"].to_pylist(), strict=True))
    missing = [key for key in keys if key not in known]
    if missing:
        raise ContractError(f"{len(missing)} rows have no score; first: {missing[:5]}", "judgements", SCORE_FIRST)
    return np.asarray([known[key] for key in keys], dtype=np.float32)


def judgements_of(labeler: Piece[Labels], judgements: Artifact | None) -> pa.Table | None:
    """What the reward model said; None where the labeler does not ask. Raises where it asks and nothing was said."""
    if "reward_scores" not in labeler.needs:
        return None
    if judgements is None:
        raise InputError(f"label {labeler.name!r} needs reward_scores, and there are no judgements", do=SCORE_FIRST)
    if "reward_scores" not in pq.read_schema(judgements.part_paths()[0]).names:
        raise ContractError("these scores have no reward_scores", str(judgements.path), SCORE_FIRST)
    return judgements.table(list(SCORED))


@dataclass
class Judge:
    """Rewards parts of rollouts."""

    settings: Settings
    prompts: pa.Table
    """`prompt_id`, `answer`, `grader`."""
    asked_in: Artifact
    """What they are columns of."""
    scored: pa.Table | None
    """What the reward model said, where the labeler asks."""
    processors: int
    """That graders may use."""
    journal: Path
    """Where verdicts are kept for the try after a crash."""

    @cached_property
    def labeler(self) -> Piece[Labels]:
        """Who rewards."""
        return LABELERS.take(self.settings.label)

    @cached_property
    def filters(self) -> list[Piece[Kept]]:
        """Who decides which rows train."""
        return [FILTERS.take(line) for line in self.settings.filter]

    @cached_property
    def memory(self) -> Memory:
        """Of the graders, over the parts that are judged here."""
        return Memory(Journal(self.journal))

    def __call__(self, part: pa.Table) -> Judged:
        """The part with its rewards."""
        rows = asked(part["prompt_id"].to_pylist(), self.prompts)
        if "verdicts" in self.labeler.needs:
            refuse_unanswered(rows, self.asked_in)
        if "answers" in self.labeler.needs:
            refuse_ungraded(rows, self.asked_in)
        scores = None if self.scored is None else scores_of(part, self.scored)
        means = Means(self.settings.grader_seconds, self.processors, self.memory)
        retried, recovered = self.memory.retried, self.memory.recovered
        made = judged(part, rows, self.labeler, self.filters, self.settings, means, scores)
        return replace(made, retried=self.memory.retried - retried, recovered=self.memory.recovered - recovered)

    def rest(self) -> None:
        """Close the journal."""
        if "memory" in vars(self):
            self.memory.close()
            del self.memory


@stage(writes=LABELS, version=2, shards=True)
def label(inputs: Inputs, settings: Settings, out: Outbox) -> None:
    """Reward every response; decide which rows train, and say why not."""
    prompts = inputs.prompts.table(["prompt_id", "answer", "grader"])
    if settings.grader is not None:
        prompts = prompts.set_column(2, "grader", pa.array([settings.grader] * len(prompts), pa.string()))
    scored = judgements_of(LABELERS.take(settings.label), inputs.judgements)
    journal = NOWHERE if elsewhere() else out.working / "judgements.jsonl"
    judge = Judge(settings, prompts, inputs.prompts, scored, processors(), journal)
    tally = Tally()
    for index, (made,) in enumerate(spread(judge, inputs.rollouts.parts(), lambda part: [part])):
        room = made.keys.num_rows if settings.room is None else settings.room - tally.groups_kept
        reasons, kept = without_surplus(made.reasons, made.columns["group"], max(room, 0))
        tally.groups_kept += kept
        tally.add(made, reasons)
        out.write(index, labelled(made, reasons))
    tally.report(out)


if __name__ == "__main__":
    label.main()
