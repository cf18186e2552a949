"""When is an answer right?

    response --extract--> answer --same--> reference        judge() does it for a column of responses

A grader that may hang or eat memory says `risky = True` and works in processes that are killed when they are late
(`pool.py`). Whatever happens, every row gets one `Judgement`, in order. What cannot be judged is null, never wrong:

    status           correct   when
    correct, wrong   yes, no   the answer was compared with the reference
    no answer        no        the response holds nothing to compare
    bad reference    null      the reference is missing or cannot be read; `extracted` is still filled
    timeout          null      grading took longer than the limit
    error            null      the grader failed on this row, or its process died

Where there is no reference, answers are compared with each other: `classes()` numbers the equal ones of a group.
"""

import hashlib
import importlib
import json
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from pipeline.errors import InputError
from pipeline.journal import Journal

Status = Literal["correct", "wrong", "no answer", "bad reference", "timeout", "error"]
Reading = Literal["read", "no answer", "unreadable", "timeout", "error"]

GRADERS = {
    "math": "pipeline.grading.math:MathGrader",
    "exact": "pipeline.grading.exact:ExactGrader",
    "none": "pipeline.grading.none:NoGrader",
}
"""Name in the `grader` column -> module and class; the module is imported when the grader is opened."""

PROBE = "0"
"""Every answer is compared with it before it is compared with others: what cannot bear that cannot bear anything."""

LOST: Mapping[str, Literal["timeout", "error"]] = {"timeout": "timeout", "error": "error"}
"""Statuses of rows that the grader did not get through."""


Row = tuple[Any, str | None]
"""A response, or an answer extracted already (None: there is none), and the reference."""


class Grader(Protocol):
    """Finds the answer in a response and compares it with the reference."""

    risky: ClassVar[bool]
    """True: may hang, crash or eat memory on hostile text, so it must run in killable processes."""
    literal: ClassVar[bool]
    """True: two extracted answers are the same where they are equal strings, and nowhere else."""

    def extract(self, text: str) -> str | None:
        """Return the answer found in a response; None where there is none."""
        ...

    def readable(self, reference: str) -> bool:
        """Whether anything can be compared with this reference at all."""
        ...

    def same(self, answer: str, reference: str) -> bool:
        """Whether an extracted answer equals the reference. An unreadable reference equals nothing."""
        ...


class Judgement(NamedTuple):
    """The verdict on one response."""

    correct: bool | None
    extracted: str | None
    status: Status


class Work(Protocol):
    """Judges different rows, one judgement per row, in order."""

    def __call__(
        self, rows: Sequence[Row], /, *, workers: int, learn: Callable[[Row, Judgement], None] | None = None
    ) -> list[Judgement]:
        """Judge, and hand each judgement to `learn` as soon as it is there."""
        ...


class Memory:
    """What graders that work in processes said of rows, for a stage that may be killed and tried again.

    With it, rows that they did not get through are tried once more after the others of the call, by half as many
    processes: a machine that was busy for a moment should not cost a label. Such rows are never remembered.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._known = {name: Judgement(*judgement) for name, *judgement in journal.entries()}
        self.retried = 0
        """Rows tried once more."""
        self.recovered = 0
        """Those of them that the grader then got through."""

    def close(self) -> None:
        """Remember nothing more."""
        self._journal.close()

    def judge(self, rows: Sequence[Row], work: Work, workers: int, about: tuple[str, bool]) -> list[Judgement]:
        """Let `work` judge those of these different rows that no earlier try did; `about` is whose rows they are."""
        names = {row: _name(about, row) for row in rows}
        verdicts = {row: self._known[name] for row, name in names.items() if name in self._known}

        def learn(row: Row, judgement: Judgement) -> None:
            if judgement.status not in LOST:
                self._journal.add([names[row], *judgement])

        left = [row for row in rows if row not in verdicts]
        verdicts |= zip(left, work(left, workers=workers, learn=learn), strict=True)
        lost = [row for row in left if verdicts[row].status in LOST]
        verdicts |= zip(lost, work(lost, workers=max(1, workers // 2), learn=learn), strict=True)
        self.retried += len(lost)
        self.recovered += sum(verdicts[row].status not in LOST for row in lost)
        return [verdicts[row] for row in rows]


def _name(about: tuple[str, bool], row: Row) -> str:
    return hashlib.blake2b(json.dumps([*about, *row]).encode(), digest_size=16).hexdigest()


class Vote(NamedTuple):
    """The answer in one response, and which answers of its group are the same."""

    answer: str | None
    number: int
    """Of its class, from 0 in the order of first appearance in the group; -1: nothing that could be compared."""
    status: Reading
    """`read`, or why the number is -1; an `unreadable` answer is none that the grader takes as a reference."""


class Classes(NamedTuple):
    """The votes of all groups."""

    votes: list[Vote]
    lost: int
    """Comparisons of two answers that hung or failed, and count as not the same."""


def open_grader(name: str) -> Grader:
    """Return the grader of that name. Raises `InputError` that lists the names there are."""
    if name not in GRADERS:
        raise InputError(
            f"no grader is called {name!r}; there are: {', '.join(GRADERS)}",
            where="column grader",
            do="write one of these names",
        )
    module, _, attribute = GRADERS[name].partition(":")
    grader: Grader = getattr(importlib.import_module(module), attribute)()
    return grader


def judge(
    grader_name: str,
    responses: Sequence[str],
    references: Sequence[str | None],
    *,
    timeout: float = 5.0,
    workers: int,
    memory: Memory | None = None,
) -> list[Judgement]:
    """Judge responses[i] against references[i]; one judgement per row, in order, whatever happens.

    `timeout` is in seconds per row; `workers` is the number of processes a risky grader may use (they are kept for
    the next call). Equal rows are judged once. Without a reference the answer is extracted all the same, so a column
    of None extracts. What `memory` has is not judged again, and the rest is added to it. Raises `InputError` for an
    unknown grader, `ValueError` when the columns differ in length, `GraderError` when no grading process starts.
    """
    rows = list(zip(responses, references, strict=True))
    return _judged(grader_name, rows, timeout, workers, memory, extracted=False)


def compare(
    grader_name: str,
    answers: Sequence[str | None],
    references: Sequence[str | None],
    *,
    timeout: float = 5.0,
    workers: int,
    memory: Memory | None = None,
) -> list[Judgement]:
    """Judge answers that are extracted already; otherwise as `judge`."""
    return _judged(grader_name, list(zip(answers, references, strict=True)), timeout, workers, memory, extracted=True)


def classes(
    grader_name: str,
    responses: Sequence[str],
    group: Sequence[Hashable],
    *,
    timeout: float = 5.0,
    workers: int,
    memory: Memory | None = None,
) -> Classes:
    """Extract the answer of each response and number the equal ones of each group; one vote per response, in order.

    An answer is compared with the first member of each class, in the order of the classes, and joins the first that it
    equals: `same` need be neither symmetric nor transitive, so the order of the responses decides what is compared
    with what. Equal strings are compared once. `timeout` (in seconds), `workers`, `memory` and errors are those of
    `judge`.
    """
    rows = list(zip(responses, group, strict=True))
    found = judge(grader_name, responses, [None] * len(rows), timeout=timeout, workers=workers, memory=memory)
    answers = list(dict.fromkeys(row.extracted for row in found if row.extracted is not None))
    probes = compare(grader_name, [PROBE] * len(answers), answers, timeout=timeout, workers=workers, memory=memory)
    readings = {answer: _reading(probe) for answer, probe in zip(answers, probes, strict=True)}
    waiting: dict[Hashable, dict[str, None]] = {}
    for (_, g), row in zip(rows, found, strict=True):
        if row.extracted is not None and readings[row.extracted] == "read":
            waiting.setdefault(g, {})[row.extracted] = None
    distinct = {g: list(those) for g, those in waiting.items()}
    if open_grader(grader_name).literal:
        numbers, lost = {(g, answer): n for g, those in distinct.items() for n, answer in enumerate(those)}, 0
    else:
        numbers, lost = _numbered(grader_name, distinct, timeout, workers, memory)
    votes = []
    for (_, g), (_, answer, status) in zip(rows, found, strict=True):
        if answer is None:
            votes.append(Vote(None, -1, LOST.get(status, "no answer")))
        else:
            votes.append(Vote(answer, numbers.get((g, answer), -1), readings[answer]))
    return Classes(votes, lost)


def _reading(probe: Judgement) -> Reading:
    """What comparing an answer with the probe says of it."""
    return LOST.get(probe.status, "unreadable" if probe.correct is None else "read")


def _numbered(
    grader_name: str, distinct: dict[Hashable, list[str]], timeout: float, workers: int, memory: Memory | None
) -> tuple[dict[tuple[Hashable, str], int], int]:
    """Class of each (group, answer), and comparisons lost.

    Each turn makes a class of every group's first answer that has none, and compares the rest with it: the classes
    that comparing one answer after the other would give, with the comparisons of all groups side by side.
    """
    numbers: dict[tuple[Hashable, str], int] = {}
    turn = lost = 0
    while distinct:
        pairs = [(g, answer, those[0]) for g, those in distinct.items() for answer in those[1:]]
        compared = compare(
            grader_name, [a for _, a, _ in pairs], [b for _, _, b in pairs], timeout=timeout, workers=workers,
            memory=memory,
        )  # fmt: skip
        lost += sum(judgement.correct is None for judgement in compared)
        same = {(g, answer) for (g, answer, _), judgement in zip(pairs, compared, strict=True) if judgement.correct}
        numbers |= {(g, those[0]): turn for g, those in distinct.items()} | dict.fromkeys(same, turn)
        left = {g: [answer for answer in those[1:] if (g, answer) not in same] for g, those in distinct.items()}
        distinct = {g: those for g, those in left.items() if those}
        turn += 1
    return numbers, lost


def _judged(
    grader_name: str, rows: Sequence[Row], timeout: float, workers: int, memory: Memory | None, *, extracted: bool
) -> list[Judgement]:
    """Judge different rows once, where the grader may run.

    Responses differ nearly always, and their answers seldom: a risky grader extracts first, and then compares each
    answer with a reference once.
    """
    grader = open_grader(grader_name)
    different = list(dict.fromkeys(rows))
    if not grader.risky:
        row_judge = compare_row if extracted else judge_row
        verdicts = {(text, reference): row_judge(grader, text, reference) for text, reference in different}
        return [verdicts[row] for row in rows]

    from pipeline.grading.pool import shared_pool

    def worked(some: list[Row], *, extracted: bool) -> dict[Row, Judgement]:
        work = partial(shared_pool(grader_name).judge, timeout=timeout, extracted=extracted)
        if memory is None:
            return dict(zip(some, work(some, workers=workers), strict=True))
        return dict(zip(some, memory.judge(some, work, workers, (grader_name, extracted)), strict=True))

    if extracted:
        verdicts = _compared_once(grader_name, different, partial(worked, extracted=True))
        return [verdicts[row] for row in rows]
    found = worked(list(dict.fromkeys((text, None) for text, _ in different)), extracted=False)
    pairs = {
        (text, reference): (found[text, None].extracted, reference)
        for text, reference in different
        if reference is not None and found[text, None].status not in LOST
    }
    compared = _compared_once(grader_name, list(dict.fromkeys(pairs.values())), partial(worked, extracted=True))
    return [compared[pairs[row]] if row in pairs else found[row[0], None] for row in rows]


MOST_KNOWN = 1 << 17
"""Pairs whose comparison a process remembers: about 30 MB."""

_known: dict[str, Judgement] = {}
_known_lock = threading.Lock()


def _compared_once(
    grader_name: str, pairs: list[Row], work: Callable[[list[Row]], dict[Row, Judgement]]
) -> dict[Row, Judgement]:
    """Compare different answers with their references, but those that this process has compared before.

    A comparison depends on grader, answer and reference alone, so what is remembered only saves time. It lives and dies
    with the process, as the pool does: a file would have to be read and written by stages that were not handed it.
    """
    names = {pair: _name((grader_name, True), pair) for pair in pairs}
    with _known_lock:
        verdicts = {pair: _known[name] for pair, name in names.items() if name in _known}
    new = work([pair for pair in pairs if pair not in verdicts])
    with _known_lock:
        _known.update((names[pair], verdict) for pair, verdict in new.items() if verdict.status not in LOST)
        for name in list(islice(_known, max(0, len(_known) - MOST_KNOWN))):
            del _known[name]
    return verdicts | new


def judge_row(grader: Grader, response: str, reference: str | None) -> Judgement:
    """Judge one response here and now, without protection from a grader that hangs."""
    try:
        extracted = grader.extract(response)
    except MemoryError:
        raise  # the process is no longer fit for the next row: its owner decides
    except Exception:
        return Judgement(None, None, "error")
    return compare_row(grader, extracted, reference)


def compare_row(grader: Grader, answer: str | None, reference: str | None) -> Judgement:
    """Judge one extracted answer here and now, as `judge_row` does."""
    try:
        if reference is None or not grader.readable(reference):
            return Judgement(None, answer, "bad reference")
        if answer is None:
            return Judgement(False, None, "no answer")
        correct = grader.same(answer, reference)
    except MemoryError:
        raise
    except Exception:
        return Judgement(None, answer, "error")
    return Judgement(correct, answer, "correct" if correct else "wrong")
