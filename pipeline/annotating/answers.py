"""Files that came back from annotators to answers: all faults found at once, each with its place and how to mend it.

    .jsonl .ndjson .json   {"question_id", "annotator", "ranks": {response_id: rank}, "seconds"}: one per annotator and
                           question; without ranks it is not answered yet
    .csv                   question_id, annotator, response_id, rank: one row per response; where all ranks of a
                           question are blank it is not answered yet

Ranks are whole numbers from 1, the best; equal numbers are ties, gaps say nothing. Ids decide: other columns, texts
among them, are ignored. The order of rows and columns, the case of column names and spaces around values do not matter.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.annotating.sheets import Question
from pipeline.errors import InputError

FORMATS = (".csv", ".json", ".jsonl", ".ndjson")
RANKS = range(1, 100)
SHOWN = 20
"""Faults that are listed; the others are counted."""
ANYBODY = "anybody"
"""Stands for the annotator of a question that has no names."""

_WHOLE = re.compile(r"0*([0-9]{1,2})(\.0*)?")
_NO_LETTER = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class RawRow(Protocol):
    """A row as it is in a file, and where it stands."""

    @property
    def values(self) -> Mapping[str, Any]:
        """Column -> value."""

    @property
    def where(self) -> str:
        """`path:line`, or `path[index]`."""


@dataclass(frozen=True)
class Fault:
    """Something in a file that cannot be used."""

    where: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.mend}"


@dataclass(frozen=True)
class Answer:
    """One annotator's order of the responses to one question."""

    question_id: str
    annotator: str
    ranks: tuple[int, ...]
    """Of each response, in the order of the question: dense from 0, the best."""
    seconds: float | None = None
    """Spent on it."""


@dataclass(frozen=True)
class Answers:
    """All that came back, in the order of the questions and of those who were asked."""

    given: tuple[Answer, ...]
    blank: int
    """Questions handed back without ranks, and not with ranks in another place, counted for each annotator."""


@dataclass(frozen=True)
class _Cell:
    """The rank of one response, as it is in the file."""

    where: str
    response_id: str
    rank: Any


@dataclass
class _Entry:
    """What a file holds of one annotator about one question."""

    where: str
    question_id: str
    annotator: Any
    """A text without spaces around it; anything else is a fault."""
    seconds: Any
    cells: list[_Cell] = field(default_factory=list)

    @property
    def blank(self) -> bool:
        return all(_blank(cell.rank) for cell in self.cells)

    @property
    def about(self) -> str:
        return f"question {_id(self.question_id)}" + (f" by {_id(self.annotator)}" if self.annotator else "")


def read(files: Iterable[tuple[Path, Iterable[RawRow]]], questions: Sequence[Question]) -> Answers:
    """The answers in files, each given with its rows, to these questions.

    Raises `InputError` that lists the faults of all files if there is any. A row generator may raise `InputError` for
    what it cannot read: a fault like others.
    """
    faults: list[Fault] = []
    places: list[str] = []
    desk = _Desk({question["question_id"]: question for question in questions}, faults)
    for path, rows in files:
        before = len(faults)
        for entry in _entries(path, rows, faults):
            desk.take(entry)
        if len(faults) > before:
            places.append(f"{path} ({len(faults) - before})")
    if faults:
        raise _refusal(faults, places)
    position = {question_id: number for number, question_id in enumerate(desk.questions)}

    def order(answer: Answer) -> tuple[int, int, str]:
        names = desk.questions[answer.question_id]["annotators"]
        return position[answer.question_id], names.index(answer.annotator) if names else 0, answer.annotator

    answered = desk.places.keys() | {(question_id, "") for question_id, _ in desk.places}
    return Answers(tuple(sorted(desk.given, key=order)), len(desk.blank - answered))


def asked(questions: Sequence[Question]) -> Counter[str]:
    """Annotator -> rankings asked for: one by each who is named, one by anybody where nobody is."""
    return Counter(name for question in questions for name in question["annotators"] or [ANYBODY])


def unanswered(questions: Sequence[Question], answers: Sequence[Answer]) -> Counter[str]:
    """Annotator -> rankings asked for that are not among the answers; only those who have some left."""
    given = {(answer.question_id, answer.annotator) for answer in answers}
    touched = {answer.question_id for answer in answers}
    left: Counter[str] = Counter()
    for question in questions:
        question_id = question["question_id"]
        left.update(name for name in question["annotators"] if (question_id, name) not in given)
        left.update([ANYBODY] if not question["annotators"] and question_id not in touched else [])
    return left


def _refusal(faults: Sequence[Fault], places: Sequence[str]) -> InputError:
    number = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    first = f"; the first {SHOWN}" if len(faults) > SHOWN else ""
    listed = "".join(f"\n  {fault}" for fault in faults[:SHOWN])
    return InputError(
        f"{number} in the annotators' files{first}:{listed}",
        ", ".join(places),
        "correct the files and run this again; they are as they were, and nothing was written",
    )


def _entries(path: Path, rows: Iterable[RawRow], faults: list[Fault]) -> Iterator[_Entry]:
    """What a file holds, by annotator and question."""
    if path.suffix.lower() not in FORMATS:
        what = "a folder" if path.is_dir() else f"cannot read files of type {path.suffix!r}"
        faults.append(Fault(str(path), what, f"name files of type {', '.join(FORMATS)}; a spreadsheet saves .csv"))
    elif path.suffix.lower() == ".csv":
        yield from _from_table(_readable(path, rows, faults), faults)
    else:
        yield from _from_objects(_readable(path, rows, faults), faults)


def _readable(path: Path, rows: Iterable[RawRow], faults: list[Fault]) -> Iterator[RawRow]:
    """The rows up to the first that cannot be read."""
    some = False
    try:
        for row in rows:
            some = True
            yield row
    except InputError as error:
        mend = error.do or "correct this line"
        if path.suffix.lower() == ".csv":
            mend = "save it as CSV with commas between the columns, in UTF-8"
        faults.append(Fault(error.where or str(path), f"{error.what}, and nothing from here on was read", mend))
    else:
        if not some:
            faults.append(Fault(str(path), "the file is empty", "fill it in again, or leave it out"))


def _from_objects(rows: Iterable[RawRow], faults: list[Fault]) -> Iterator[_Entry]:
    for row in rows:
        values = _lower(row)
        if what := _misfit(row, values, ("question_id", "annotator", "ranks")):
            faults.append(Fault(row.where, what, "take the line of annotate.jsonl as it is and fill in its ranks"))
            continue
        entry = _entry(row, values)
        if not isinstance(values["ranks"], dict):
            what = f"ranks of {entry.about} is {_shown(values['ranks'])}, no object"
            faults.append(Fault(row.where, what, 'write {"response_id": rank, ...}, or {} while it is not answered'))
            continue
        entry.cells += [_Cell(row.where, _text(name), rank) for name, rank in values["ranks"].items()]
        yield entry


def _from_table(rows: Iterable[RawRow], faults: list[Fault]) -> Iterator[_Entry]:
    entries: dict[tuple[str, str], _Entry] = {}
    for row in rows:
        values = _lower(row)
        if what := _misfit(row, values, ("question_id", "annotator", "response_id", "rank")):
            faults.append(Fault(f"{row.where.rpartition(':')[0]}:1", what, _mend_header(list(values))))
            return
        if all(map(_blank, values.values())):  # what a spreadsheet leaves of a row whose cells were emptied
            continue
        found = _entry(row, values)
        entry = entries.setdefault((found.question_id, found.annotator), found)
        entry.cells.append(_Cell(row.where, _text(values["response_id"]), values["rank"]))
        entry.seconds = found.seconds if _blank(entry.seconds) else entry.seconds
    yield from entries.values()


def _lower(row: RawRow) -> dict[str, Any]:
    return {name.strip().lower(): value for name, value in row.values.items()}


def _misfit(row: RawRow, values: Mapping[str, Any], needed: Sequence[str]) -> str | None:
    """What is wrong with the columns."""
    found = ", ".join(map(str.strip, row.values)) or "nothing"
    if missing := [name for name in needed if name not in values]:
        return f"no {', no '.join(missing)}; found {_short(found)}"
    return f"columns that differ in case only: {_short(found)}" if len(values) < len(row.values) else None


def _mend_header(found: Sequence[str]) -> str:
    if len(found) == 1 and (";" in found[0] or "\t" in found[0]):
        return "save it as CSV with commas between the columns"
    return "leave the header of annotate.csv as it is"


def _entry(row: RawRow, values: Mapping[str, Any]) -> _Entry:
    name = values["annotator"]
    annotator = _text(name) if name is None or isinstance(name, str) else name
    return _Entry(row.where, _text(values["question_id"]), annotator, values.get("seconds"))


@dataclass
class _Desk:
    """Takes what came back, entry by entry, and notes what is wrong with it."""

    questions: Mapping[str, Question]
    faults: list[Fault]
    given: list[Answer] = field(default_factory=list)
    blank: set[tuple[str, str]] = field(default_factory=set)
    """Question and annotator of what is not answered yet."""
    places: dict[tuple[str, str], str] = field(default_factory=dict)
    """Question and annotator -> where their ranks were first met."""

    def take(self, entry: _Entry) -> None:
        question = self.questions.get(entry.question_id)
        if question is None:
            what = f"question_id {_shown(entry.question_id)} is none of the {len(self.questions)} questions"
            mend = "rank with the questions that this file was written for, or write it again from these"
            self._refuse(entry.where, what, mend)
        elif entry.blank:
            self.blank.add((entry.question_id, str(entry.annotator)))
        else:
            self._take_ranks(entry, question)

    def _take_ranks(self, entry: _Entry, question: Question) -> None:
        before = len(self.faults)
        self._check_annotator(entry, question)
        self._check_once(entry)
        ranks = self._ranks(entry, question)
        seconds = self._seconds(entry)
        if len(self.faults) == before:
            steps = sorted(set(ranks.values()))
            dense = tuple(steps.index(ranks[response_id]) for response_id in question["response_ids"])
            self.given.append(Answer(entry.question_id, entry.annotator, dense, seconds))

    def _check_annotator(self, entry: _Entry, question: Question) -> None:
        name, those = entry.annotator, question["annotators"]
        who = f"who was asked: {', '.join(those)}" if those else "the name of who ranked"
        if name == "":
            self._refuse(entry.where, f"{entry.about} has ranks and no annotator", f"write {who}")
        elif not isinstance(name, str) or _NO_LETTER.search(name):
            self._refuse(
                entry.where, f"annotator of question {entry.question_id} is {_shown(name)}, no name", f"write {who}"
            )
        elif those and name not in those:
            what = f"annotator {_shown(name)} was not asked question {entry.question_id}"
            self._refuse(entry.where, what, f"remove it, or write {who}")

    def _check_once(self, entry: _Entry) -> None:
        key = (entry.question_id, str(entry.annotator))
        if entry.annotator != "" and key in self.places:
            what = f"{entry.about} is answered a second time; the first time at {self.places[key]}"
            self._refuse(entry.where, what, "keep one of the two; of a file that was saved twice give the later one")
        self.places.setdefault(key, entry.where)

    def _ranks(self, entry: _Entry, question: Question) -> dict[str, int]:
        met: dict[str, str] = {}
        ranks: dict[str, int] = {}
        for cell in entry.cells:
            self._check_response(cell, entry, question, met.get(cell.response_id))
            met.setdefault(cell.response_id, cell.where)
            rank = rank_of(cell.rank)
            if rank is not None:
                ranks[cell.response_id] = rank
            elif _blank(cell.rank):
                what = f"response {_id(cell.response_id)} of {entry.about} has no rank, others have"
                self._refuse(cell.where, what, "rank all responses of a question or none")
            else:
                what = f"rank of response {_id(cell.response_id)} of {entry.about} is {_shown(cell.rank)}, no rank"
                mend = f"write a whole number from {RANKS[0]}, the best, to {RANKS[-1]}; equal numbers are ties"
                self._refuse(cell.where, what, mend)
        if missing := [response_id for response_id in question["response_ids"] if response_id not in met]:
            what = f"{entry.about} has no rank for response {', '.join(missing)}"
            self._refuse(entry.where, what, "rank all responses of a question or none")
        return ranks

    def _check_response(self, cell: _Cell, entry: _Entry, question: Question, first: str | None) -> None:
        known = question["response_ids"]
        if cell.response_id not in known:
            what = f"response_id {_id(cell.response_id)} is no response of {entry.about}"
            self._refuse(cell.where, what, f"its responses are {', '.join(known)}")
        elif first is not None:
            what = f"response {_id(cell.response_id)} of {entry.about} is ranked a second time"
            self._refuse(cell.where, what + (f", after {first}" if first != cell.where else ""), "keep one of the two")

    def _seconds(self, entry: _Entry) -> float | None:
        if entry.seconds is None or _blank(entry.seconds):
            return None
        try:
            seconds = math.nan if isinstance(entry.seconds, bool) else float(entry.seconds)
        except (TypeError, ValueError, OverflowError):
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            what = f"seconds of {entry.about} is {_shown(entry.seconds)}"
            self._refuse(entry.where, what, "write a finite number from 0, or leave it out")
        return seconds

    def _refuse(self, where: str, what: str, mend: str) -> None:
        self.faults.append(Fault(where, what, mend))


def rank_of(value: Any) -> int | None:
    """The rank that was written, `2`, `2.0`, `"2"` or `" 2.0 "`; None for what is no whole number from 1 to 99."""
    if isinstance(value, str):
        whole = _WHOLE.fullmatch(value.strip())
        value = int(whole[1]) if whole else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in RANKS:
        return None
    return int(value)


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _id(value: Any) -> str:
    """A name as a message has it."""
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 40 else _shown(value)


def _shown(value: Any) -> str:
    """A value as a message has it: short, and of letters that every terminal prints."""
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
