"""The same for columns in which every row names its own grader, and all that may be read in responses at once."""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int

from pipeline import grading
from pipeline.grading import LOST, Classes, Judgement, Memory

T = TypeVar("T")


def judge(
    names: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str | None],
    *,
    timeout: float,
    workers: int,
    memory: Memory | None = None,
) -> list[Judgement]:
    """`grading.judge`, row i by the grader `names[i]`."""
    return _each(
        names,
        lambda name, rows: grading.judge(
            name,
            [responses[p] for p in rows],
            [references[p] for p in rows],
            timeout=timeout,
            workers=workers,
            memory=memory,
        ),
    )


def compare(
    names: Sequence[str],
    answers: Sequence[str | None],
    references: Sequence[str | None],
    *,
    timeout: float,
    workers: int,
    memory: Memory | None = None,
) -> list[Judgement]:
    """`grading.compare`, row i by the grader `names[i]`."""
    return _each(
        names,
        lambda name, rows: grading.compare(
            name,
            [answers[p] for p in rows],
            [references[p] for p in rows],
            timeout=timeout,
            workers=workers,
            memory=memory,
        ),
    )


def classes(
    names: Sequence[str],
    responses: Sequence[str],
    group: Sequence[Hashable],
    *,
    timeout: float,
    workers: int,
    memory: Memory | None = None,
) -> Classes:
    """`grading.classes`, row i by the grader `names[i]`; a group has one grader."""
    lost = []

    def vote(name: str, rows: list[int]) -> list[grading.Vote]:
        made = grading.classes(
            name, [responses[p] for p in rows], [group[p] for p in rows], timeout=timeout, workers=workers,
            memory=memory,
        )  # fmt: skip
        lost.append(made.lost)
        return made.votes

    votes = _each(names, vote)
    return Classes(votes, sum(lost))


def _each(names: Sequence[str], work: Callable[[str, list[int]], list[T]]) -> list[T]:
    """Hand each grader its rows; put what comes back in the order of the rows."""
    made: dict[int, T] = {}
    for name in sorted(set(names)):
        rows = [p for p, wanted in enumerate(names) if wanted == name]
        made |= zip(rows, work(name, rows), strict=True)
    return [made[p] for p in range(len(names))]


@dataclass(frozen=True)
class Reading:
    """What graders read in responses, row by row."""

    extracted: Sequence[str | None]
    gold: Sequence[Judgement | None]
    """The verdict by the reference; None where the prompt has no answer or no grader."""
    statuses: Sequence[str | None]
    """How that went which the reward depends on; None where it depends on no grader."""
    classes: Int[np.ndarray, " B"] | None = None
    """Number of the class of equal answers within the group, -1 without an answer; None where nothing votes."""
    lost: int = 0
    """Comparisons of two answers that hung or failed."""


@dataclass(frozen=True)
class Means:
    """What graders may use."""

    timeout: float
    """Seconds for a row."""
    workers: int
    """Processes of a risky grader."""
    memory: Memory | None = None
    """Of earlier tries at the same rows."""


def read(
    names: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str | None],
    group: Sequence[Hashable],
    *,
    needs: Collection[str],
    last: Bool[np.ndarray, " B"],
    means: Means,
) -> Reading:
    """Extract answers, compare them with the reference and, where `answers` are among the needs, with each other.

    What is extracted, and how it is numbered, depends on references only where `verdicts` are among the needs. Rows
    marked `last` are compared after the others of their group: they neither lead a class nor come first among equals.
    """
    if "answers" in needs:
        made = _voted(names, responses, references, group, last, means)
        by_reference = [None if judgement is None else judgement.status for judgement in made.gold]
        return replace(made, statuses=by_reference) if "verdicts" in needs else made
    told = references if "verdicts" in needs else [None] * len(names)
    found = judge(names, responses, told, timeout=means.timeout, workers=means.workers, memory=means.memory)
    extracted = [judgement.extracted for judgement in found]
    if "verdicts" in needs:
        return Reading(extracted, found, [judgement.status for judgement in found])
    gold = _gold(names, references, extracted, [judgement.status for judgement in found], means)
    return Reading(extracted, gold, [None] * len(names))


def _voted(
    names: Sequence[str], responses: Sequence[str], references: Sequence[str | None], group: Sequence[Hashable],
    last: Bool[np.ndarray, " B"], means: Means,
) -> Reading:  # fmt: skip
    order = np.argsort(last, kind="stable")
    columns = ([column[p] for p in order] for column in (names, responses, group))
    made = classes(*columns, timeout=means.timeout, workers=means.workers, memory=means.memory)
    votes = [made.votes[p] for p in np.argsort(order)]
    answers, statuses = [vote.answer for vote in votes], [vote.status for vote in votes]
    gold = _gold(names, references, answers, statuses, means)
    return Reading(answers, gold, statuses, np.asarray([vote.number for vote in votes]), made.lost)


def _gold(
    names: Sequence[str], references: Sequence[str | None], answers: Sequence[str | None], statuses: Sequence[str],
    means: Means,
) -> list[Judgement | None]:  # fmt: skip
    """The judgements there are; an answer whose extraction was lost is not one that was not given."""
    compared = compare(names, answers, references, timeout=means.timeout, workers=means.workers, memory=means.memory)
    gold: list[Judgement | None] = []
    for reference, answer, status, judgement in zip(references, answers, statuses, compared, strict=True):
        lost = LOST.get(status) if answer is None else None
        known = judgement if lost is None else Judgement(None, None, lost)
        gold.append(None if reference is None else known)
    return gold
