"""Who is asked what, and the two plain files that a question can be answered in.

    annotate.csv      one row per annotator, question and response; an empty column `rank`
    annotate.jsonl    one line per annotator and question; an empty object `ranks`

Both hold the same; the rows of an annotator stand together. Where anybody may answer, `annotator` is empty too.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.seeds import derive

CSV_FILE = "annotate.csv"
JSONL_FILE = "annotate.jsonl"
COLUMNS = ("question_id", "annotator", "response_id", "rank", "prompt", "response")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""A spreadsheet takes a cell that begins so for a formula, whoever wrote it; the last four are the wide forms."""
LONGEST_CELL = 32_000
"""Characters: a spreadsheet breaks a cell of more than 32,767 and moves what follows into other rows."""

Question = Mapping[str, Any]
"""A row of the questions contract."""


def assigned(question_ids: Sequence[str], annotators: Sequence[str], overlap: int, seed: int) -> dict[str, list[str]]:
    """Question -> the `overlap` annotators who are asked, in the order of `annotators`.

    Loads differ by at most one: the next question goes to those with the fewest so far, and among these to those who
    have met the least. Follows from the seed and the set of questions, not from their order.
    """
    loads: Counter[str] = Counter()
    met: Counter[frozenset[str]] = Counter()
    chosen: dict[str, list[str]] = {}
    for question_id in sorted(question_ids, key=lambda name: (derive(seed, "ask", "turn", name), name)):
        those: list[str] = []
        while len(those) < overlap:
            left = [name for name in annotators if name not in those]
            keys = {
                name: (
                    loads[name], sum(met[frozenset((name, other))] for other in those),
                    derive(seed, "ask", "annotator", question_id, name),
                )
                for name in left
            }  # fmt: skip
            those.append(min(left, key=keys.__getitem__))
        loads.update(those)
        met.update(map(frozenset, combinations(those, 2)))
        chosen[question_id] = [name for name in annotators if name in those]
    return chosen


def people(questions: Sequence[Question]) -> list[str]:
    """Names of all who are asked, in alphabetical order; none where anybody may answer."""
    names = {name for question in questions for name in question["annotators"]}
    return sorted(names, key=lambda name: (name.casefold(), name))


def write_csv(path: Path, questions: Sequence[Question]) -> None:
    """One row per annotator, question and response, as a spreadsheet opens it safely.

    UTF-8 with a mark by which Excel knows it. A text that would be taken for a formula begins with an apostrophe, one
    that is too long for a cell is cut and says so: texts are there to be read, ids decide.
    """
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for annotator, question in _asked(questions):
            prompt = _cell(conversation(question["messages"]))
            for response_id, text in zip(question["response_ids"], question["responses"], strict=True):
                writer.writerow((question["question_id"], annotator, response_id, "", prompt, _cell(text)))


def write_jsonl(path: Path, questions: Sequence[Question]) -> None:
    """One line per annotator and question."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for annotator, question in _asked(questions):
            line = {
                "question_id": question["question_id"], "annotator": annotator, "messages": question["messages"],
                "responses": responses(question), "ranks": {},
            }  # fmt: skip
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def responses(question: Question) -> list[dict[str, str]]:
    """The responses with their ids, in the order of the question."""
    both = zip(question["response_ids"], question["responses"], strict=True)
    return [{"response_id": response_id, "text": text} for response_id, text in both]


def conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """The turns as one text; with the role before each where there is more than one."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def _asked(questions: Sequence[Question]) -> Iterator[tuple[str, Question]]:
    """(annotator, question), by annotator; an empty name where anybody may answer."""
    yield from (("", question) for question in questions if not question["annotators"])
    for name in people(questions):
        yield from ((name, question) for question in questions if name in question["annotators"])


def _cell(text: str) -> str:
    """A text that a spreadsheet shows and does not execute."""
    plain = text.replace("\0", "\ufffd") or "(empty response)"
    if len(plain) > LONGEST_CELL:
        plain = f"{plain[:LONGEST_CELL]} (cut here: the whole text is in {JSONL_FILE})"
    return f"'{plain}" if plain.startswith(FORMULA) else plain
